"""The replay as a picture: load, hosts and routers over the day, written as SVG by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.elasticity.fleet import Outcome
from tests.benchmarks.elasticity.requests import Requests
from tests.benchmarks.elasticity.search import Found

WIDTH, PANEL, LEFT, TOP, GAP = 960, 150, 70, 46, 44
COLUMNS = 840  # points of a curve; each shows the largest value of its part of the day
LOAD, FIXED, PAID, READY = "#8a8f98", "#c2410c", "#93c5fd", "#1d4ed8"


def draw(requests: Requests, fixed: Found, elastic: Found, file: Path) -> None:
    """Three panels with one time axis, in hours of simulated time."""
    outcome = elastic.outcome
    times = outcome.counts[:, 0]
    offered = np.histogram(requests.arrival_s, bins=COLUMNS, range=(0, requests.span_s), weights=requests.prompt)[0]
    panels = [
        _panel(0, "prompt tokens a second that arrive", [(offered / (requests.span_s / COLUMNS), LOAD)], None),
        _panel(1, "expert hosts", _curves(outcome, times, requests.span_s, 2, 4), fixed.shape.hosts.max),
        _panel(2, "routers", _curves(outcome, times, requests.span_s, 1, 3), fixed.shape.routers.max),
    ]
    height = TOP + 3 * (PANEL + GAP)
    hours = []
    for part in range(0, 25, 4):
        x, hour = LEFT + part / 24 * COLUMNS, part / 24 * requests.span_s / 3600
        hours.append(f'<text x="{x:.0f}" y="{height - 20}" text-anchor="middle">{hour:.0f} h</text>')
    legend = []
    for place, (colour, text) in enumerate(
        ((FIXED, "smallest fixed fleet"), (PAID, "elastic: nodes paid for"), (READY, "elastic: serving"))
    ):
        x = LEFT + 210 * place
        legend.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="22">{text}</text>')
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(legend)}{"".join(panels)}{"".join(hours)}</svg>\n'
    )


def _curves(outcome: Outcome, times: NDArray[np.float64], span_s: float, paid: int, ready: int):
    place = np.minimum((times / span_s * COLUMNS).astype(int), COLUMNS - 1)
    curves = []
    for column, colour in ((paid, PAID), (ready, READY)):
        most = np.zeros(COLUMNS)
        np.maximum.at(most, place, outcome.counts[:, column])
        curves.append((most, colour))
    return curves


def _panel(number: int, title: str, curves: Sequence[tuple[NDArray[np.float64], str]], level: int | None) -> str:
    bottom = TOP + number * (PANEL + GAP) + PANEL
    top_value = max([float(values.max()) for values, _ in curves] + [level or 0]) * 1.05
    parts = [f'<text x="{LEFT}" y="{bottom - PANEL - 6}" font-weight="bold">{title}</text>']
    for values, colour in curves:
        points = " ".join(
            f"{LEFT + x},{bottom - value / top_value * PANEL:.1f} {LEFT + x + 1},{bottom - value / top_value * PANEL:.1f}"
            for x, value in enumerate(values)
        )
        parts.append(f'<polygon points="{LEFT},{bottom} {points} {LEFT + len(values)},{bottom}" fill="{colour}"/>')
    if level is not None:
        y = bottom - level / top_value * PANEL
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + COLUMNS}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FIXED}" stroke-width="2"/>')
    for share in (0.0, 0.5, 1.0):
        value = share * top_value / 1.05
        y = bottom - value / top_value * PANEL
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{LEFT + COLUMNS}" y1="{bottom}" y2="{bottom}" stroke="black"/>')
    return "".join(parts)
