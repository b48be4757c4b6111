"""Several generations of one call, read as one stream."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from router.request import Delta, Request

OnDelta = Callable[[Delta], None]
Arrival = tuple[int, Delta, float]  # index of the request, what came, and when on the event loop's clock


class Generator(Protocol):
    """The way to the routers.

    Cancelling it cancels the request. Raises router.errors.RequestError (QueueFull and kin), ExpertsUnavailable or
    cluster.errors.NoRouter, or tells a last delta with a failure. A first delta without tokens says that it was admitted.
    """

    def generate(self, request: Request, on_delta: OnDelta) -> Awaitable[None]:
        """Tells the request's deltas as they come, to the one with `finish`. `on_delta` never waits."""
        ...


class Fan:
    """Runs the requests at once and gives their deltas as they come, each with its request's index.

    Every request has a task of its own, so that closing it runs to the end even where the reader is itself cancelled. No task is woken
    for a delta but the reader's, and that one once for all that have come: a gateway that is behind takes more at a time.
    What a slow reader has not taken is bounded by the requests' max_tokens.
    """

    def __init__(self, generator: Generator, requests: Sequence[Request]) -> None:
        self._clock = asyncio.get_running_loop().time
        self._ready: list[Arrival] = []
        self._failure: Exception | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._stopped = [False] * len(requests)
        self._finished = [False] * len(requests)
        self._tasks = [asyncio.create_task(self._run(index, generator, request)) for index, request in enumerate(requests)]

    async def next(self) -> list[Arrival]:
        """The deltas that are ready, one at least. Once there is none, raises what `fail` was given or a generator raised."""
        while True:
            ready = [arrival for arrival in self._ready if not self._stopped[arrival[0]]]
            self._ready.clear()
            if ready:
                return ready
            if self._failure is not None:
                raise self._failure
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted

    def fail(self, error: Exception) -> None:
        """No further delta is taken: `next` gives those that are ready, and raises it."""
        if self._failure is None:
            self._failure = error
        self._wake()

    def stop(self, index: int) -> None:
        """Closes one request; none of its deltas follows."""
        if not self._stopped[index] and not self._finished[index]:
            self._tasks[index].cancel()  # once: it may be telling a router
        self._stopped[index] = True

    async def close(self) -> None:
        """Closes all requests. They are told before the first wait, so a cancelled caller does no harm."""
        for index in range(len(self._tasks)):
            self.stop(index)
        await asyncio.wait(self._tasks)

    async def _run(self, index: int, generator: Generator, request: Request) -> None:
        try:
            await generator.generate(request, partial(self._take, index))
            if not self._finished[index]:
                raise RuntimeError("the generation ended without a finish")
        except Exception as error:
            if not self._stopped[index] and not self._finished[index]:
                self.fail(error)

    def _take(self, index: int, delta: Delta) -> None:
        self._finished[index] |= delta.finish is not None
        if self._failure is None:
            self._ready.append((index, delta, self._clock()))
            self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)
