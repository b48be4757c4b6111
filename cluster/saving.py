"""When the Coordinator's state is to be written to the store, and whether the store can be had."""

from collections.abc import Callable
from typing import Any

from cluster.decisions import DecisionLog
from cluster.state_store import StoredState

LOAD_INTERVAL_S = 10.0  # the load windows alone are worth a write this often


class Saving:
    """Somebody else writes, apart from the exchange calls: takes `due`, then says `saved` or `failed`."""

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float], log: DecisionLog) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._log = log
        self._is_dirty = True
        self._written_s = clock()
        self.store_name = "memory"
        self.error: str | None = None
        self.saved_unix_s: float | None = None

    def touch(self) -> None:
        """Something changed that should be written soon."""
        self._is_dirty = True

    def due(self, state: Callable[[], StoredState]) -> StoredState | None:
        """The state if it should be written now; it counts as written until `failed` says otherwise."""
        now = self._clock()
        if not self._is_dirty and now - self._written_s < LOAD_INTERVAL_S:
            return None
        self._is_dirty, self._written_s = False, now
        return state()

    def saved(self) -> None:
        """The store has it."""
        if self.error is not None:
            self._log.tell("store", f"the state store {self.store_name} is back")
        self.error, self.saved_unix_s = None, round(self._wall_clock(), 3)

    def failed(self, reason: str) -> None:
        """The store cannot be had; everything goes on, and the state is written when it is back."""
        if self.error is None:
            self._log.tell("store", f"{reason}; going on without it")
        self.error, self._is_dirty = reason, True

    def view(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.store_name, "is_available": self.error is None, "error": self.error, "saved_unix_s": self.saved_unix_s}
