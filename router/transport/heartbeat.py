"""Heartbeats: when a router asks a quiet host whether it lives, and when it takes it for silent or dead. Pure; times are given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeartbeatLimits:
    """A host that owes an answer is asked after `interval_s` of silence; it is dead `dead_after_s` after an unanswered question."""

    interval_s: float = 0.04
    dead_after_s: float = 5.0


class Heartbeat:
    """What the router's end knows of the host's life. Times are of one monotonic clock, in seconds.

    Only a PING without any answer counts, as silence or as death: a router that was itself away for long finds the answers
    waiting for it and does not blame the host. So whoever asks `is_silent` or `is_dead` has read all that has arrived.
    """

    def __init__(self, limits: HeartbeatLimits, now: float) -> None:
        self._limits = limits
        self._pinged_at: float | None = None
        self._owed_since = now
        self.last_heard = now
        self.num_answered = 0

    def hear(self, now: float) -> None:
        """Anything at all has come from the host."""
        self.last_heard = now
        self._pinged_at = None

    def owe(self, now: float) -> None:
        """The host owes an answer, and owed none before. A PING that it has left unanswered stays so: it may be frozen still."""
        self._owed_since = now

    def is_ping_due(self, now: float) -> bool:
        """Whether to ask, given that an answer is owed."""
        return self._pinged_at is None and now - max(self.last_heard, self._owed_since) >= self._limits.interval_s

    def ping(self, now: float) -> None:
        """A PING has been sent."""
        self._pinged_at = now

    @property
    def is_answered(self) -> bool:
        """Whether something has come since the last PING."""
        return self._pinged_at is None

    def is_silent(self, now: float, after_s: float) -> bool:
        """Whether a PING has stayed without answer for `after_s`."""
        return self._pinged_at is not None and now - self._pinged_at >= after_s

    def is_dead(self, now: float) -> bool:
        """Whether a PING has stayed without answer for too long."""
        return self.is_silent(now, self._limits.dead_after_s)
