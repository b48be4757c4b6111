"""Small multiples, written as SVG by hand: each sweep's measured steps against its law, both axes logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLUMNS = 3
WIDTH, HEIGHT = 300, 190  # of a panel's plot
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 60, 34
MEASURED, LAW, CALLS = "#1d4ed8", "#c2410c", "#8a8f98"


@dataclass(frozen=True)
class Curve:
    """y in milliseconds; measured curves are drawn as points on a line, the others as a line."""

    name: str
    colour: str
    y: tuple[float, ...]
    is_measured: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over the same x."""

    title: str
    note: str
    x: tuple[int, ...]
    curves: tuple[Curve, ...]


def nice_ticks(low: float, high: float) -> list[float]:
    """1, 2 or 5 times powers of ten from at most `low` to at least `high`; powers alone where that would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    first = max(index for index, tick in enumerate(every) if tick <= low * (1 + 1e-9))
    last = min(index for index, tick in enumerate(every) if tick >= high * (1 - 1e-9))
    return every[first : last + 1]


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Panels row by row, and one legend."""
    step_x, step_y = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    rows = -(-len(panels) // COLUMNS)
    width, height = step_x * min(COLUMNS, len(panels)), 26 + step_y * rows
    body = [_legend(panels)]
    for number, panel in enumerate(panels):
        x, y = step_x * (number % COLUMNS), 26 + step_y * (number // COLUMNS)
        body.append(f'<g transform="translate({x + LEFT},{y + TOP})">{_panel(panel)}</g>')
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(body)}</svg>\n'
    )


def _legend(panels: Sequence[Panel]) -> str:
    """Each name once, in order of appearance."""
    colours = {curve.name: curve.colour for panel in panels for curve in panel.curves}
    parts, x = [], LEFT
    for name, colour in colours.items():
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="20">{escape(name)}</text>')
        x += 40 + 6 * len(name)
    return "".join(parts)


def _panel(panel: Panel) -> str:
    values = [value for curve in panel.curves for value in curve.y]
    ticks = nice_ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    first, last = math.log(panel.x[0]), math.log(panel.x[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (math.log(x) - first) / (last - first) * WIDTH, HEIGHT - (math.log(y) - low) / (high - low) * HEIGHT

    parts = [
        f'<text x="0" y="-34" font-weight="bold" font-size="13">{escape(panel.title)}</text>'
        f'<text x="0" y="-18" fill="#555">{escape(panel.note)}</text>'
    ]
    for tick in ticks:
        y = place(panel.x[0], tick)[1]
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#e5e7eb"/><text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for value in panel.x:
        x = place(value, ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{value}</text>')
    for curve in panel.curves:
        points = [place(x, y) for x, y in zip(panel.x, curve.y, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = "" if curve.is_measured else ' stroke-dasharray="5 3"'
        parts.append(f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="1.8"{dash}/>')
        if curve.is_measured:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>' for x, y in points]
    parts.append(f'<path d="M0 {HEIGHT}H{WIDTH}" stroke="black"/>')
    return "".join(parts)
