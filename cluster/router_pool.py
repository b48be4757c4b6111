"""The gateway's way to the routers: chooses one per request, carries it there and brings its deltas back."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress

from actors.exchange import RouterEntry
from cluster.errors import NoRouter
from router import wire
from router.errors import ChannelError
from router.placement_map import Endpoint, HostKey
from router.request import Delta, Request
from router.transport.messages import MessageClient

logger = logging.getLogger("shoal")

# A request that loses its router is handed to another one this many times: one that kills routers must not kill them all.
MAX_RESUBMISSIONS = 1
Connect = Callable[[Endpoint], Awaitable[MessageClient]]


class _Link:
    """One open channel to one router, and the requests that are on it."""

    def __init__(self, key: HostKey, client: MessageClient) -> None:
        self.key = key
        self.client = client
        self.streams: dict[str, asyncio.Queue[Delta | None]] = {}
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for message in self.client:
                for delta in wire.deltas_from_wire(message):
                    if delta.request_id in self.streams:
                        self.streams[delta.request_id].put_nowait(delta)
        except ChannelError as error:
            logger.warning("router %s is gone: %s", self.key.replica_id, error)
        finally:
            for stream in self.streams.values():
                stream.put_nowait(None)  # the router is gone
            await self.client.close()


class RouterPool:
    """Implements `cluster.gateway.Generator` over channels. One event loop uses it.

    `routers` answers with the Coordinator's present registry; `wait_s` bounds the wait for a router where there is none.
    """

    def __init__(self, connect: Connect, routers: Callable[[], tuple[RouterEntry, ...]], wait_s: float = 10.0) -> None:
        self._connect = connect
        self._routers = routers
        self._wait_s = wait_s
        self._links: dict[HostKey, _Link] = {}
        self._connecting = asyncio.Lock()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The request's deltas, to the last. Closing the iterator cancels it at its router.

        A router that dies is replaced by another, which goes on after the tokens already sent. Raises NoRouter.
        """
        deadline_s = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        for attempt in range(MAX_RESUBMISSIONS + 1):
            if attempt:
                logger.warning("request %s goes to another router", request.request_id)
            link = await self._choose()
            async with aclosing(self._on(link, request)) as deltas:
                async for delta in deltas:
                    request = _after(request, delta)
                    yield delta
                    if delta.finish is not None:
                        return
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            request = request.model_copy(update={"deadline_s": left_s})
        raise NoRouter("the routers that served this request died; please send it again")

    def close(self) -> None:
        """Ends every channel."""
        for link in self._links.values():
            link.reader.cancel()

    async def _on(self, link: _Link, request: Request) -> AsyncGenerator[Delta, None]:
        """Deltas of one request on one router; ends without a finish if the router dies."""
        stream: asyncio.Queue[Delta | None] = asyncio.Queue()
        link.streams[request.request_id] = stream
        finished = False
        try:
            try:
                await link.client.send(wire.submit(request))
            except ChannelError:
                finished = True
                return
            while (delta := await stream.get()) is not None:
                finished = delta.finish is not None
                yield delta
                if finished:
                    return
            finished = True
        finally:
            link.streams.pop(request.request_id, None)
            if not finished and not link.reader.done():
                with suppress(ChannelError):
                    await link.client.send(wire.cancel(request.request_id))

    async def _choose(self) -> _Link:
        """The live router with the fewest requests of ours, then the least full by its own report."""
        until = time.monotonic() + self._wait_s
        while True:
            entries = {entry.key: entry for entry in self._routers()}
            await self._open(entries)
            live = [link for key, link in self._links.items() if key in entries]
            if live:
                return min(live, key=lambda link: (len(link.streams), entries[link.key].stats.get("num_waiting", 0.0)))
            if time.monotonic() > until:
                raise NoRouter(f"no router could take the request within {self._wait_s:.0f} s; try again")
            await asyncio.sleep(0.05)

    async def _open(self, entries: dict[HostKey, RouterEntry]) -> None:
        """Opens channels to routers that are new, forgets those that are gone."""
        for key in [key for key, link in self._links.items() if link.reader.done()]:
            del self._links[key]
        if all(key in self._links for key in entries):
            return
        async with self._connecting:
            for key, entry in entries.items():
                if key in self._links:
                    continue
                try:
                    self._links[key] = _Link(key, await self._connect(entry.endpoint))
                except (ChannelError, OSError, TimeoutError) as error:
                    logger.warning("router %s cannot be reached: %s", key.replica_id, error)


def _after(request: Request, delta: Delta) -> Request:
    """What is still to be asked once `delta` has reached the client: its tokens are said, the prompt's logprobs too."""
    sampling = request.sampling.model_copy(update={"prompt_logprobs": None}) if delta.prompt_logprobs else request.sampling
    return request.model_copy(update={"generated_token_ids": request.generated_token_ids + delta.token_ids, "sampling": sampling})
