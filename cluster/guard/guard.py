"""Checks keys, counts what they use, and ends what runs on a key that was revoked."""

import asyncio
import logging
import time
import uuid
import weakref
from collections.abc import Callable
from contextvars import ContextVar

from cluster.guard.counts import Counts, Demand, LocalCounts, Refusal, Use
from cluster.guard.errors import PermissionDenied, TooManyRequests, Unauthenticated
from cluster.guard.key_source import KeySource
from cluster.guard.keys import MAX_KEY_CHARS, ApiKey, Scope

logger = logging.getLogger("shoal")
DUTY_INTERVAL_S = 1.0
RENEW_INTERVAL_S = 5.0

OnRevoked = Callable[[Exception], None]


class OpenStream:
    """One call that generates, until `end`. Tokens are counted here, and told to where they are counted within DUTY_INTERVAL_S."""

    def __init__(self, grant: "Grant", guard: "Guard | None", stream_id: str = "") -> None:
        self.grant = grant
        self.stream_id = stream_id
        self.untold_tokens = 0
        self.told_s = 0.0
        self.on_revoked: OnRevoked | None = None
        self._guard = guard

    def count(self, num_tokens: int) -> None:
        """What was generated since."""
        self.untold_tokens += num_tokens

    def end(self) -> None:
        """It counts no more. Never waits, so that a caller who is cancelled can call it. Idempotent."""
        self.grant.streams.discard(self)
        if self._guard is not None:
            self._guard.end(self)


class Grant:
    """What a checked key gives one call. `key` None is ANONYMOUS, where no key is asked for."""

    def __init__(self, guard: "Guard | None" = None, key: ApiKey | None = None, scope: Scope = "any") -> None:
        self._guard = guard
        self.key = key
        self.scope = scope
        self.is_revoked = False
        self.streams: set[OpenStream] = set()
        self._num_opened = 0

    @property
    def key_id(self) -> str:
        """For logs and metrics."""
        return "anonymous" if self.key is None else self.key.id

    def check(self) -> None:
        """Raises PermissionDenied once the key was revoked."""
        if self.is_revoked:
            raise self._denial()

    def revoke(self) -> None:
        """Everything that runs on it ends: `on_revoked` of each stream is called with the error to end it by."""
        self.is_revoked = True
        for stream in tuple(self.streams):
            if stream.on_revoked is not None:
                stream.on_revoked(self._denial())

    async def open_stream(self, num_prompt_tokens: int) -> OpenStream:
        """Counts a stream and its prompt; TooManyRequests past a limit, PermissionDenied if the key was revoked.

        The call's own request was counted when it was admitted; every stream after its first counts as one more.
        """
        self.check()
        self._num_opened += 1
        if self._guard is None or self.key is None:
            return OpenStream(self, None)
        counting = None if self.key.are_none else self._guard
        stream = OpenStream(self, counting, uuid.uuid4().hex)
        if counting is not None:
            await counting.begin(stream, num_prompt_tokens, num_requests=min(1, self._num_opened - 1))
        self.streams.add(stream)
        return stream

    def _denial(self) -> PermissionDenied:
        return PermissionDenied(f"The API key {self.key_id} was revoked.")


ANONYMOUS = Grant()
_GRANT: ContextVar[Grant] = ContextVar("grant", default=ANONYMOUS)


def current_grant() -> Grant:
    """That of the call which this task answers."""
    return _GRANT.get()


class Guard:
    """One gateway's. `clock` in seconds, of any origin; it is what local counts go by."""

    def __init__(self, source: KeySource, counts: Counts | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self.counts: Counts = counts or LocalCounts()
        self._clock = clock
        self._looked_s = clock()
        self._grants: weakref.WeakSet[Grant] = weakref.WeakSet()
        self._streams: dict[str, OpenStream] = {}
        self._ended: list[Use] = []
        self._telling = asyncio.Lock()
        self._wake = asyncio.Event()
        self._duty: asyncio.Task[None] | None = None

    @property
    def num_keys(self) -> int:
        """How many hold now."""
        return len(self._source.ring.keys)

    @property
    def problem(self) -> str | None:
        """Why the keys file is not followed, if it is not."""
        return self._source.problem

    async def admit(self, authorization: str | None, scope: Scope, now_s: float | None = None) -> Grant:
        """What `authorization` ("Bearer KEY") may do, as one request of its key. It is `current_grant()` from here on.

        Raises Unauthenticated, PermissionDenied or TooManyRequests.
        """
        now_s = self._clock() if now_s is None else now_s
        self._begin_duties()
        if now_s - self._looked_s >= DUTY_INTERVAL_S:
            self.look(now_s)
        key = self._key(authorization)
        if not key.has(scope):
            raise PermissionDenied(f"The API key {key.id} has no scope {scope}.", scope)
        if key.requests_per_minute is not None:
            self._raise_on(await self.counts.take(Demand(key.id, key, num_requests=1), now_s), key)
        grant = Grant(self, key, scope)
        self._grants.add(grant)
        _GRANT.set(grant)
        return grant

    async def begin(self, stream: OpenStream, num_prompt_tokens: int, num_requests: int) -> None:
        """Counts a stream; TooManyRequests."""
        key = stream.grant.key
        assert key is not None
        now_s = self._clock()
        if self._ended or self._telling.locked():  # a client that begins its next call at once must not find its last one in the way
            await self.tell(now_s)
        demand = Demand(key.id, key, num_requests, num_prompt_tokens, stream.stream_id)
        self._raise_on(await self.counts.take(demand, now_s), key)
        stream.told_s = now_s
        self._streams[stream.stream_id] = stream
        self._begin_duties()

    def end(self, stream: OpenStream) -> None:
        """It counts no more, as soon as Redis hears of it: the caller, who may be cancelled, does not wait for that."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._ended.append(Use(stream.grant.key_id, stream.stream_id, stream.untold_tokens, is_open=False))
        self._wake.set()

    def look(self, now_s: float) -> None:
        """Reads the keys if they have changed, and revokes what no longer holds."""
        self._looked_s = now_s
        if not self._source.refresh():
            return
        for grant in tuple(self._grants):
            key = grant.key and self._source.ring.current(grant.key)
            if key is None or not key.has(grant.scope):
                grant.revoke()

    async def tell(self, now_s: float) -> None:
        """What was used since last time."""
        async with self._telling:
            uses, self._ended = self._ended, []
            for stream in self._streams.values():
                if stream.untold_tokens or now_s - stream.told_s >= RENEW_INTERVAL_S:
                    uses.append(Use(stream.grant.key_id, stream.stream_id, stream.untold_tokens, is_open=True))
                    stream.untold_tokens, stream.told_s = 0, now_s
            if uses:
                await self.counts.tell(uses, now_s)

    async def close(self) -> None:
        """Ends the duties and lets go of connections."""
        if self._duty is not None:
            self._duty.cancel()
            await asyncio.wait({self._duty})
            self._duty = None
        await self.counts.close()

    def _key(self, authorization: str | None) -> ApiKey:
        scheme, _, presented = (authorization or "").strip().partition(" ")
        if not presented:
            raise Unauthenticated("This needs an API key: send it as `Authorization: Bearer KEY`.", was_given=bool(scheme))
        presented = presented.strip()
        key = None
        if scheme.lower() == "bearer" and len(presented) <= MAX_KEY_CHARS:
            key = self._source.ring.find(presented)
        if key is None:
            raise Unauthenticated("The API key is not known here.", was_given=True)
        return key

    def _raise_on(self, refusal: Refusal | None, key: ApiKey) -> None:
        if refusal is None:
            return
        what = refusal.limit.replace("_", " ")
        hint = "; this one call needs more than that" if refusal.retry_after_s is None else ""
        raise TooManyRequests(f"The API key {key.id} may use {getattr(key, refusal.limit)} {what}{hint}.", refusal.retry_after_s)

    def _begin_duties(self) -> None:
        if self._duty is None or self._duty.done():
            self._duty = asyncio.get_running_loop().create_task(self._do_duties(), name="guard")

    async def _do_duties(self) -> None:
        while True:
            self._wake.clear()
            try:
                now_s = self._clock()
                self.look(now_s)
                await self.tell(now_s)
            except Exception:
                logger.exception("the guard's duties failed; they go on")
            try:
                async with asyncio.timeout(DUTY_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
