"""The sums of all members there ever were: what a member had told stays counted when it dies."""

from collections.abc import Hashable, Mapping

from actors.metrics import Series, Sums

MAX_MEMBERS = 4096  # whose last word is remembered; the longest silent are forgotten, their sums are not


class SumsLedger:
    """`totals` never fall. A report that was overtaken adds nothing, and a member that comes back goes on where it was."""

    def __init__(self) -> None:
        self.totals: Sums = {}
        self._told: dict[Hashable, Sums] = {}

    def take(self, member: Hashable, sums: Mapping[Series, float]) -> None:
        """Adds what the member, in this life of its process, has counted beyond what it had told."""
        told = self._told.pop(member, {})
        for series, value in sums.items():
            gain = value - told.get(series, 0.0)
            if gain > 0:
                self.totals[series] = self.totals.get(series, 0.0) + gain
                told[series] = value
        self._told[member] = told
        while len(self._told) > MAX_MEMBERS:
            del self._told[next(iter(self._told))]
