"""A request's body, taken in whole before anything else is done with it, within bounds of size, time and memory.

Serve's proxy has no such bounds: it passes on what arrives as it arrives. So a client that sends slowly, or without end, is met
here: it holds one task and what it has sent so far, and nobody else waits for it.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from cluster.guard.errors import BodyTooLarge, BodyTooSlow, TooManyRequests

WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")
# A client that is still writing reads no answer: so much of what is too much is read and thrown away first.
LINGER_S = 1.0
LINGER_BODIES = 4


@dataclass(frozen=True)
class BodyBounds:
    """`max_held_bytes` is of all bodies that one gateway is reading."""

    max_bytes: int = 1 << 24
    timeout_s: float = 30.0
    max_held_bytes: int = 1 << 29


class BodyReader:
    """Of one gateway."""

    def __init__(self, bounds: BodyBounds) -> None:
        self._bounds = bounds
        self._held_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> Receive:
        """What the application is to `receive` instead: the body in one message. BodyTooLarge, BodyTooSlow or TooManyRequests."""
        headers = Headers(scope=scope)
        length = headers.get("content-length")
        if length is None and "transfer-encoding" not in headers and scope["method"] in WITHOUT_BODY:
            return receive
        if length is not None and length.isdigit() and int(length) > self._bounds.max_bytes:
            await self._linger(receive)
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._bounds.timeout_s):
                last = await self._read_into(chunks, receive)
        except TimeoutError:
            raise BodyTooSlow(f"The body did not arrive within {self._bounds.timeout_s:g} s.") from None
        finally:
            self._held_bytes -= sum(map(len, chunks))
        return _replay(b"".join(chunks), last, receive)

    async def _read_into(self, chunks: list[bytes], receive: Receive) -> Message:
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._bounds.max_bytes:
                if message.get("more_body", False):
                    await self._linger(receive)
                raise self._too_large()
            chunks.append(chunk)
            self._held_bytes += len(chunk)
            if self._held_bytes > self._bounds.max_held_bytes:
                raise TooManyRequests("The gateway is taking in as many bodies as it has memory for.", 1.0)
            if not message.get("more_body", False):
                return message

    async def _linger(self, receive: Receive) -> None:
        left = LINGER_BODIES * self._bounds.max_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is over {self._bounds.max_bytes} bytes; send less.")


def _replay(body: bytes, last: Message, receive: Receive) -> Receive:
    """The body, or the client's leaving, and then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False} if last["type"] == "http.request" else last]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
