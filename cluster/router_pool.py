"""The gateway's way to the routers: chooses one per request, carries it there and brings its deltas back."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from actors.exchange import RouterEntry
from cluster.api.fan import OnDelta
from cluster.errors import NoRouter
from router import wire
from router.errors import ChannelClosed, ChannelError, FrameError
from router.placement_map import Endpoint, HostKey
from router.request import Delta, Failure, Request
from router.transport.messages import MessageClient

logger = logging.getLogger("shoal")

# A request that loses its router is handed to another one this many times: one that kills routers must not kill them all.
MAX_RESUBMISSIONS = 1
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
_POLL_S = 0.02
Connect = Callable[[Endpoint], Awaitable[MessageClient]]


class _Stream:
    """One request on a link. `ended` is True after its finish, False if the link ended before."""

    __slots__ = ("ended", "on_delta")

    def __init__(self, on_delta: OnDelta) -> None:
        self.on_delta = on_delta
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def end(self, *, is_whole: bool) -> None:
        """Nothing more comes of it."""
        if not self.ended.done():
            self.ended.set_result(is_whole)


class _Link:
    """One open channel to one router, and the requests that are on it. Once it is not live it never is again."""

    def __init__(self, client: MessageClient) -> None:
        self._client = client
        self.is_live = True
        self.streams: dict[str, _Stream] = {}

    async def read(self) -> None:
        """Tells deltas until the channel ends."""
        try:
            async for message in self._client:
                for delta in wire.deltas_from_wire(message):
                    stream = self.streams.get(delta.request_id)
                    if stream is not None and not stream.ended.done():
                        stream.on_delta(delta)
                        if delta.finish is not None:
                            stream.end(is_whole=True)
        finally:
            self.give_up()
            await self._client.close()

    def give_up(self) -> None:
        """No request is put here any more, and those that are look for another router."""
        self.is_live = False
        for stream in self.streams.values():
            stream.end(is_whole=False)

    async def run(self, request: Request, on_delta: OnDelta) -> bool:
        """One request to its finish, or False if the router dies before. ChannelClosed if the request never left."""
        stream = self.streams[request.request_id] = _Stream(on_delta)
        is_over = False
        try:
            try:
                await self._send(wire.submit(request))
            except ChannelError:
                is_over = True
                if stream.ended.done() and stream.ended.result():
                    return True  # the router had it all the same, and has answered
                raise
            is_whole = await stream.ended
            is_over = True
            return is_whole
        finally:
            self.streams.pop(request.request_id, None)
            if not is_over and self.is_live:
                try:
                    await self._send(wire.cancel(request.request_id))
                except ChannelError as error:
                    logger.warning("request %s cannot be cancelled: %s", request.request_id, error)

    async def _send(self, message: wire.Wire) -> None:
        try:
            await self._client.send(message)
        except ChannelClosed:
            self.give_up()
            raise


class RouterPool:
    """Implements `cluster.gateway.Generator` over channels. One event loop uses it.

    `routers` answers with the Coordinator's present registry; `wait_s` bounds the wait for a router where there is none.
    `on_resubmission` is told of every request that goes on at another router.
    """

    def __init__(
        self,
        connect: Connect,
        routers: Callable[[], tuple[RouterEntry, ...]],
        wait_s: float = 10.0,
        on_resubmission: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._routers = routers
        self._wait_s = wait_s
        self._on_resubmission = on_resubmission
        self._links: dict[HostKey, _Link] = {}
        self._keepers: dict[HostKey, asyncio.Task[None]] = {}

    async def generate(self, request: Request, on_delta: OnDelta) -> None:
        """Tells the request's deltas, to the last. Cancelling it cancels the request at its router.

        A router that dies is replaced by another, which goes on after the tokens already told. Raises NoRouter.
        """
        deadline = math.inf if request.deadline_s is None else time.monotonic() + request.deadline_s
        num_deaths = 0
        until = self._until(deadline)
        while True:
            link = await self._choose(until)
            if deadline < math.inf:
                request = request.model_copy(update={"deadline_s": deadline - time.monotonic()})
            said = _Said(on_delta)
            try:
                if await link.run(request, said):
                    return
            except FrameError as error:
                failure = Failure("invalid_request", f"The request cannot be sent: {error}.")
                on_delta(Delta(request.request_id, finish="error", failure=failure))
                return
            except ChannelClosed:
                if time.monotonic() < until:
                    request = said.rest_of(request)
                    continue  # it never left, as far as we know: not this request's doing
            request = said.rest_of(request)
            num_deaths += 1
            if num_deaths > MAX_RESUBMISSIONS:
                raise NoRouter("the routers that served this request died; please send it again")
            logger.warning("request %s goes to another router", request.request_id)
            self._on_resubmission()
            until = self._until(deadline)

    def close(self) -> None:
        """Ends every channel."""
        for keeper in self._keepers.values():
            keeper.cancel()

    def _until(self, deadline: float) -> float:
        return min(time.monotonic() + self._wait_s, deadline)

    async def _choose(self, until: float) -> _Link:
        """The live router with the fewest requests of ours, then the least full by its own report. At once if there is one."""
        while True:
            entries = {entry.key: entry for entry in self._routers()}
            self._tend(entries)
            live = [(link, entries[key]) for key, link in self._links.items() if link.is_live and key in entries]
            if live:
                return min(live, key=lambda pair: (len(pair[0].streams), pair[1].stats.get("num_waiting", 0.0)))[0]
            if time.monotonic() >= until:
                raise NoRouter(f"no router could take the request within {self._wait_s:.0f} s; try again")
            await asyncio.sleep(_POLL_S)

    def _tend(self, entries: dict[HostKey, RouterEntry]) -> None:
        """A task for every router of the registry; those of others end with their last request."""
        for key, keeper in list(self._keepers.items()):
            link = self._links.get(key)
            if key not in entries and (link is None or not link.streams):
                keeper.cancel()
            if keeper.done():
                del self._keepers[key]
        for key, entry in entries.items():
            if key not in self._keepers:
                self._keepers[key] = asyncio.create_task(self._keep(entry))

    async def _keep(self, entry: RouterEntry) -> None:
        """Keeps a channel to one router as long as the registry has it; says once per outage that there is none."""
        key, name = entry.key, entry.key.replica_id
        backoff_s = FIRST_BACKOFF_S
        is_out = False
        while any(other.key == key for other in self._routers()):
            opened_s = math.inf
            try:
                link = _Link(await self._connect(entry.endpoint))
                opened_s = time.monotonic()
                if is_out:
                    logger.info("router %s is back", name)
                is_out = False
                self._links[key] = link
                await link.read()
                reason = "it closed the channel"
            except Exception as error:  # whatever it is, this router is not to be had, and others are
                reason = str(error) or type(error).__name__
            finally:
                self._links.pop(key, None)
            if not is_out:
                logger.warning("router %s is out of reach, trying again: %s", name, reason)
            is_out = True
            if time.monotonic() - opened_s > MAX_BACKOFF_S:
                backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)


class _Said:
    """Passes a request's deltas on, and keeps of them what another router has to know."""

    def __init__(self, on_delta: OnDelta) -> None:
        self._on_delta = on_delta
        self._token_ids: list[int] = []
        self._has_prompt_logprobs = False

    def __call__(self, delta: Delta) -> None:
        self._token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            self._has_prompt_logprobs = True
        self._on_delta(delta)

    def rest_of(self, request: Request) -> Request:
        """What is still to be asked: after these tokens, and without the prompt's logprobs if they have reached the client."""
        sampling = request.sampling.model_copy(update={"prompt_logprobs": None}) if self._has_prompt_logprobs else request.sampling
        generated = request.generated_token_ids + tuple(self._token_ids)
        return request.model_copy(update={"generated_token_ids": generated, "sampling": sampling})
