"""Several generations of one call, read as one stream."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Protocol

from router.request import Delta, Request


class Generator(Protocol):
    """The way to the routers.

    Closing the iterator cancels the request. Raises router.errors.RequestError (QueueFull and kin), ExpertsUnavailable or
    cluster.errors.NoRouter, or yields a last delta with a failure. A first delta without tokens says that it was admitted.
    """

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """The request's deltas, to the one with `finish`."""
        ...


class Fan:
    """Runs the requests at once and gives their deltas as they come, each with its request's index.

    Every request has a task of its own, so that closing it runs to the end even where the reader is itself cancelled.
    """

    DELTAS_EACH = 4  # read ahead of a slow reader

    def __init__(self, generator: Generator, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(self.DELTAS_EACH * len(requests))
        self._tasks = [asyncio.create_task(self._pump(index, generator.generate(request))) for index, request in enumerate(requests)]
        self._stopped = [False] * len(requests)
        self._closing = [False] * len(requests)
        self._failure: Exception | None = None

    async def next(self) -> tuple[int, Delta]:
        """The next delta. Raises what a generator raised."""
        while True:
            index, item = await self._queue.get()
            if self._failure is not None:
                raise self._failure
            if self._stopped[index]:
                continue
            if isinstance(item, Exception):
                raise item
            return index, item

    def fail(self, error: Exception) -> None:
        """`next` raises it, now or when it is called."""
        self._failure = error
        with suppress(asyncio.QueueFull):  # a full queue keeps no reader waiting
            self._queue.put_nowait((0, error))

    def stop(self, index: int) -> None:
        """Closes one request; none of its deltas follows."""
        self._stopped[index] = True
        if not self._closing[index]:
            self._tasks[index].cancel()

    async def close(self) -> None:
        """Closes all requests. They are told before the first wait, so a cancelled caller does no harm."""
        for index in range(len(self._tasks)):
            self.stop(index)
        await asyncio.wait(self._tasks)

    async def _pump(self, index: int, deltas: AsyncIterator[Delta]) -> None:
        try:
            async for delta in deltas:
                await self._queue.put((index, delta))
                if delta.finish is not None:
                    return
            await self._queue.put((index, RuntimeError("the generation ended without a finish")))
        except Exception as error:
            await self._queue.put((index, error))
        finally:
            self._closing[index] = True  # from here on it is not cancelled: a router may still have to be told
            close = getattr(deltas, "aclose", None)
            if close is not None:
                await close()
