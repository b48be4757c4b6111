"""How often streams are written to, so that many of them together stay below what Serve's ingress carries."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
# One item of a stream costs Serve and Ray (2.60) 0.6 ms in the Python proxy and 0.4 ms in the replica, however much is in it
# (tests/benchmarks/ingress): past about this many a second they would queue, and every stream would wait longer than it does here.
PROXY_ITEMS_PER_S = 1000.0
# With HAProxy no proxy of Python is between, and four times the messages pass.
HAPROXY_ITEMS_PER_S = 4000.0
MAX_REST_S = 0.25


class StreamPace:
    """One gateway's; where several share a proxy each counts for itself.

    A stream that has just been written to rests for its share of a second; what comes meanwhile goes out as one. With few streams, or
    slow ones, nobody ever waits: 10 streams rest for 10 ms, less than a model takes for a token.
    """

    def __init__(self, max_items_per_s: float = PROXY_ITEMS_PER_S) -> None:
        self.max_items_per_s = max_items_per_s
        self.num_streams = 0

    @property
    def rest_s(self) -> float:
        """Least time between two items of one stream."""
        return min(MAX_REST_S, self.num_streams / self.max_items_per_s)

    def open(self) -> "PacedStream":
        """One more stream, which counts from its first item on."""
        return PacedStream(self)

    async def keep(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The same items, with a rest after each. Closing it closes `items`."""
        stream = self.open()
        try:
            async with aclosing(items):
                async for item in items:
                    yield item
                    await stream.rest()
        finally:
            stream.end()


class PacedStream:
    """One stream of a StreamPace, until `end`."""

    def __init__(self, pace: StreamPace) -> None:
        self._pace = pace
        self._has_begun = False

    async def rest(self) -> None:
        """After an item that is not the last."""
        if not self._has_begun:
            self._has_begun = True
            self._pace.num_streams += 1
        await asyncio.sleep(self._pace.rest_s)

    def end(self) -> None:
        """It is over. Once."""
        if self._has_begun:
            self._pace.num_streams -= 1
