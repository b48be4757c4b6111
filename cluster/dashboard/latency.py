"""The two latencies that the dashboard draws, out of everything that gateways have counted."""

from collections.abc import Mapping
from typing import Any

from actors.metrics import Series
from cluster.metrics.catalogue import BOUNDS

SERIES = {"time_to_first_token": "time_to_first_token_seconds", "inter_token": "inter_token_latency_seconds"}


def latencies(totals: Mapping[Series, float]) -> dict[str, dict[str, Any]]:
    """Histograms since the start: {name: {"bounds_s" [B], "counts" [B + 1]}}.

    A count is of observations up to its bound and above the one before; the last is of those above all bounds. Observations in seconds.
    """
    return {
        name: {
            "bounds_s": list(BOUNDS[series]),
            "counts": [int(totals.get((series, str(index)), 0.0)) for index in range(len(BOUNDS[series]) + 1)],
        }
        for name, series in SERIES.items()
    }
