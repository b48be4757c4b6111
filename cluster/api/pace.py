"""How often streams are written to, so that many of them together stay below what Serve's ingress carries."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
# One item of a stream costs Serve and Ray (2.60) 0.6 ms in the proxy and 0.4 ms in the replica, however much is in it
# (tests/benchmarks/ingress): past about this many a second they would queue, and every stream would wait longer than it does here.
MAX_ITEMS_PER_S = 1000.0


class Pace:
    """One gateway's. A stream that has just been written to rests for its share of a second; what comes meanwhile goes out as one.

    With few streams, or slow ones, nobody ever waits: 10 streams rest for 10 ms, less than a model takes for a token.
    """

    def __init__(self, max_items_per_s: float = MAX_ITEMS_PER_S) -> None:
        self._max_items_per_s = max_items_per_s
        self._num_streams = 0

    @property
    def rest_s(self) -> float:
        """Least time between two items of one stream."""
        return self._num_streams / self._max_items_per_s

    async def keep(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The same items, never sooner than that after one another. Closing it closes `items`."""
        clock = asyncio.get_running_loop().time
        self._num_streams += 1
        try:
            async with aclosing(items):
                async for item in items:
                    begun = clock()
                    yield item
                    wait_s = begun + self.rest_s - clock()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
        finally:
            self._num_streams -= 1
