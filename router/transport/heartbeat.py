"""Heartbeats: when a router asks a silent host whether it lives, and when it takes it for dead. Pure; times are given."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeartbeatLimits:
    """A host that owes an answer is asked after `interval_s` of silence; it is dead `dead_after_s` after an unanswered question."""

    interval_s: float = 0.5
    dead_after_s: float = 5.0


class Heartbeat:
    """What the router's end knows of the host's life. Times are of one monotonic clock, in seconds.

    Only a PING without any answer counts as death, not silence alone: a router that was itself away for long finds the
    answers waiting for it and does not blame the host.
    """

    def __init__(self, limits: HeartbeatLimits, now: float) -> None:
        self._limits = limits
        self._pinged_at: float | None = None
        self.last_heard = now
        self.num_answered = 0

    def hear(self, now: float) -> None:
        """Anything at all has come from the host."""
        self.last_heard = now
        self._pinged_at = None

    def is_ping_due(self, now: float) -> bool:
        """Whether to ask, given that an answer is owed."""
        return self._pinged_at is None and now - self.last_heard >= self._limits.interval_s

    def ping(self, now: float) -> None:
        """A PING has been sent."""
        self._pinged_at = now

    def is_dead(self, now: float) -> bool:
        """Whether a PING has stayed without answer for too long. Asked only after all that has arrived was read."""
        return self._pinged_at is not None and now - self._pinged_at >= self._limits.dead_after_s
