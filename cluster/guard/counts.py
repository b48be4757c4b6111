"""What keys have used of their limits. The protocol, and the counts of one gateway alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.guard.keys import KeyLimits
from cluster.guard.windows import live, slot_of, wait_s

STREAM_RETRY_S = 1.0  # a stream may end at any time


@dataclass(frozen=True)
class Demand:
    """What a call wants of its key's limits: all of it or nothing."""

    key_id: str
    limits: KeyLimits
    num_requests: int = 0
    num_tokens: int = 0
    stream_id: str | None = None


@dataclass(frozen=True)
class Refusal:
    """The limit that is reached, by its name in KeyLimits. `retry_after_s` None: waiting does not help."""

    limit: str
    retry_after_s: float | None


@dataclass(frozen=True)
class Use:
    """What an open stream has used since last told; the last one has `is_open` False."""

    key_id: str
    stream_id: str
    num_tokens: int
    is_open: bool


class Counts(Protocol):
    """Where use is counted. Never raises: who cannot count lets pass."""

    async def take(self, demand: Demand, now_s: float) -> Refusal | None:
        """Counts the demand, unless that would exceed a limit."""
        ...

    async def tell(self, uses: Sequence[Use], now_s: float) -> None:
        """Counts what was generated, keeps open streams counted, lets go of those that ended."""
        ...

    async def close(self) -> None:
        """Lets go of connections. Idempotent."""
        ...

    @property
    def name(self) -> str:
        """For a person: where, and whether it answers."""
        ...


class LocalCounts:
    """In this process: with two gateways a key gets its limits twice."""

    name = "each gateway for itself"

    def __init__(self) -> None:
        self._requests: dict[str, dict[int, int]] = {}
        self._tokens: dict[str, dict[int, int]] = {}
        self._streams: dict[str, set[str]] = {}

    async def take(self, demand: Demand, now_s: float) -> Refusal | None:
        """See Counts."""
        refusal = self._refusal(demand, now_s)
        if refusal is None:
            self.note(demand, now_s)
        return refusal

    def note(self, demand: Demand, now_s: float) -> None:
        """Counts it whatever the limits."""
        _add(self._requests, demand.key_id, demand.num_requests, now_s)
        _add(self._tokens, demand.key_id, demand.num_tokens, now_s)
        if demand.stream_id is not None:
            self._streams.setdefault(demand.key_id, set()).add(demand.stream_id)

    async def tell(self, uses: Sequence[Use], now_s: float) -> None:
        """See Counts."""
        for use in uses:
            _add(self._tokens, use.key_id, use.num_tokens, now_s)
            if not use.is_open:
                self._streams.get(use.key_id, set()).discard(use.stream_id)

    async def close(self) -> None:
        """See Counts."""

    def _refusal(self, demand: Demand, now_s: float) -> Refusal | None:
        limits = demand.limits
        windows = (
            ("requests_per_minute", self._requests, demand.num_requests, limits.requests_per_minute),
            ("tokens_per_minute", self._tokens, demand.num_tokens, limits.tokens_per_minute),
        )
        for name, slots, num, limit in windows:
            if num and limit is not None and (wait := wait_s(slots.get(demand.key_id, {}), now_s, num, limit)):
                return Refusal(name, None if wait == math.inf else wait)
        streams = limits.concurrent_streams
        if demand.stream_id is not None and streams is not None and len(self._streams.get(demand.key_id, ())) >= streams:
            return Refusal("concurrent_streams", STREAM_RETRY_S)
        return None


def _add(windows: dict[str, dict[int, int]], key_id: str, num: int, now_s: float) -> None:
    if num:
        slots = windows[key_id] = live(windows.get(key_id, {}), now_s)
        slots[slot_of(now_s)] = slots.get(slot_of(now_s), 0) + num
