"""Messages of one stream that are ready at the same time travel from the gateway to Serve's proxy as one.

Ray carries an item of a stream in about a millisecond, whatever its size. So a gateway that is behind hands over everything that is
ready, and the proxy writes it to the client message by message: what the client sees is the same, and a full server is no
slower than its router.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgpack

MAX_PACKED = 64  # messages


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
    """The same messages, as many together as are ready. Closing it closes `messages`; one task reads them from first to last."""
    ready: list[Any] = []
    failure: list[Exception] = []
    changed, taken = asyncio.Event(), asyncio.Event()
    is_over = False

    async def read() -> None:
        nonlocal is_over
        try:
            async with aclosing(messages):
                async for message in messages:
                    ready.append(message)
                    changed.set()
                    while len(ready) >= MAX_PACKED:
                        taken.clear()
                        await taken.wait()
        except Exception as error:
            failure.append(error)
        finally:
            is_over = True
            changed.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            await changed.wait()
            changed.clear()
            if ready:
                batch = Packed(ready.copy())
                ready.clear()
                taken.set()
                yield batch
            if is_over and not ready:
                break
        if failure:
            raise failure[0]
    finally:
        reader.cancel()
        await asyncio.wait({reader})
