"""Messages of one stream that are ready at the same time travel from the gateway to Serve's proxy as one.

Ray carries an item of a stream in about a millisecond, whatever its size. So a gateway that is behind hands over everything that is
ready, and the proxy writes it to the client message by message: what the client sees is the same, and a full server is no
slower than its router.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

import msgpack

MAX_PACKED = 64  # messages
T = TypeVar("T")


class Packed:
    """Several messages as one item of Serve's, which serialises what a method yields."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages

    def SerializeToString(self) -> bytes:
        """What `unpack` reads."""
        packed: bytes = msgpack.packb([message.SerializeToString() for message in self.messages])
        return packed


def unpack(item: bytes) -> list[bytes]:
    """The messages of one item, serialised. Empty ones, by which a method ends a stream with a status, are left out."""
    return [message for message in msgpack.unpackb(item) if message]


async def packed(messages: AsyncGenerator[Any, None]) -> AsyncGenerator[Packed, None]:
    """The same messages, as many in one item as are ready together."""
    async with aclosing(together(messages)) as batches:
        async for batch in batches:
            yield Packed(batch)


async def together(items: AsyncGenerator[T, None], most: int = MAX_PACKED) -> AsyncGenerator[list[T], None]:
    """The same items, all that are ready at a time, at most `most`. Closing it closes `items`; one task reads them, first to last."""
    ready: list[T] = []
    failure: list[Exception] = []
    changed, taken = asyncio.Event(), asyncio.Event()
    is_over = False

    async def read() -> None:
        nonlocal is_over
        try:
            async with aclosing(items):
                async for item in items:
                    ready.append(item)
                    changed.set()
                    while len(ready) >= most:
                        taken.clear()
                        await taken.wait()
        except Exception as error:
            failure.append(error)
        finally:
            is_over = True
            changed.set()

    reader = asyncio.create_task(read())
    try:
        while ready or not is_over:
            await changed.wait()
            changed.clear()
            if ready:
                batch = ready.copy()
                ready.clear()
                taken.set()
                yield batch
        if failure:
            raise failure[0]
    finally:
        reader.cancel()
        await asyncio.wait({reader})
