"""A histogram that the token path can afford: one bisection and two additions an observation."""

from bisect import bisect_left
from collections.abc import Sequence

# Seconds that a request may take or wait, in the buckets of vLLM's request latencies and some below them.
REQUEST_BOUNDS_S: tuple[float, ...] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)


class Histogram:
    """Counts of values at most each of `bounds` (ascending) and above the one before; the last count is of those above all.

    One thread observes; any may read, and may then see the sum one observation ahead of the counts.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds one value."""
        self.total += value
        self.counts[bisect_left(self.bounds, value)] += 1
