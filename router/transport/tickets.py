"""Tickets: the answers that a host owes on one channel; each is given at most once."""

import threading
from collections.abc import Callable


class Ticket:
    """One frame that waits for its answer."""

    __slots__ = ("attempt", "is_void", "num_bytes", "sequence")

    def __init__(self, sequence: int, attempt: int, num_bytes: int) -> None:
        self.sequence = sequence
        self.attempt = attempt
        self.num_bytes = num_bytes
        self.is_void = False  # answered, cancelled, or the router is gone

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.is_void


class Tickets:
    """The open tickets of one channel, at most `max_frames` and `max_bytes` of payload. Thread-safe."""

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._open: dict[int, Ticket] = {}
        self.watcher: Callable[[int], None] = lambda _number: None  # told how many are open whenever that changes
        self._lock = threading.Lock()

    def issue(self, sequence: int, attempt: int, num_bytes: int) -> Ticket | None:
        """A ticket for a frame that has arrived; None at the limit. A second frame of one sequence voids the first."""
        with self._lock:
            self._void(sequence)
            if len(self._open) >= self._max_frames or (self._open and self._num_bytes + num_bytes > self._max_bytes):
                return None
            ticket = self._open[sequence] = Ticket(sequence, attempt, num_bytes)
            self._num_bytes += num_bytes
            self.watcher(len(self._open))
            return ticket

    def redeem(self, ticket: Ticket) -> bool:
        """Whether the answer may be given now; true once."""
        with self._lock:
            if ticket.is_void:
                return False
            self._void(ticket.sequence)
            return True

    def cancel(self, sequence: int) -> None:
        """The router no longer waits for this frame. Called by the one thread that issues: what it sees empty stays so meanwhile."""
        if not self._open:
            return
        with self._lock:
            self._void(sequence)

    def cancel_all(self) -> None:
        """The router is gone."""
        with self._lock:
            for sequence in list(self._open):
                self._void(sequence)

    def _void(self, sequence: int) -> None:
        ticket = self._open.pop(sequence, None)
        if ticket is not None:
            ticket.is_void = True
            self._num_bytes -= ticket.num_bytes
            self.watcher(len(self._open))
