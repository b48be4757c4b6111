"""Messages between a gateway and a router: msgpack maps in MESSAGE frames, over the same handshake as the data plane."""

import asyncio
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import msgpack

from router.errors import ChannelClosed, FrameError, HandshakeError
from router.placement_map import Endpoint
from router.transport.connect import open_socket
from router.transport.frame_reader import Frame
from router.transport.frames import HEADER_BYTES, MAX_MESSAGE_BYTES, Bytes, FrameKind, Header, check_payload, pack_header, unpack_header
from router.transport.handshake import HANDSHAKE_TIMEOUT_S, Handshake, Role, Steps, new_incarnation
from router.transport.peer import Peer

SEND_TIMEOUT_S = 10.0
_READ_AHEAD_BYTES = 1 << 20


def encode_message(incarnation: int, message: dict[str, Any]) -> list[Bytes]:
    """The frame as the buffers to write one after another. FrameError over the limit or for what msgpack cannot carry."""
    try:
        payload: bytes = msgpack.packb(message)
    except (ValueError, TypeError, OverflowError) as error:
        raise FrameError(f"the message cannot be packed: {error}") from error
    if len(payload) > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {len(payload)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    header = Header(FrameKind.MESSAGE, incarnation, length=len(payload), payload_crc=zlib.crc32(payload))
    return [pack_header(header), payload]


def decode_message(payload: Bytes) -> dict[str, Any]:
    """FrameError unless the payload is one map."""
    try:
        message = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise FrameError(f"the message cannot be read: {error}") from error
    if not isinstance(message, dict):
        raise FrameError(f"the message is a {type(message).__name__}, not a map")
    return message


class MessageConnection:
    """The router's end, to one gateway. `handle` and `close` are the I/O thread's, `send` and `hang_up` anybody's."""

    def __init__(
        self,
        peer: Peer,
        node_id: str,
        on_message: "Callable[[MessageConnection, dict[str, Any]], None]",
        on_close: "Callable[[MessageConnection], None] | None",
    ) -> None:
        self.node_id = node_id
        self._peer = peer
        self._on_message = on_message
        self._on_close = on_close

    def send(self, message: dict[str, Any]) -> None:
        """Never waits: a gateway that lets its queue overflow is cut off, and one that is gone gets nothing."""
        self._peer.write(encode_message(self._peer.incarnation, message))

    def hang_up(self) -> None:
        """Ends the connection; `on_close` follows."""
        self._peer.hang_up()

    def handle(self, frame: Frame) -> None:
        """FrameError, which ends the connection, if the payload is no message."""
        self._on_message(self, decode_message(frame.payload))

    def close(self) -> None:
        """The gateway is gone."""
        if self._on_close is not None:
            self._on_close(self)


class MessageClient:
    """The gateway's end, in an event loop: one task reads, any task sends. Iteration ends when the router is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incarnation: int) -> None:
        self._reader = reader
        self._writer = writer
        self._incarnation = incarnation
        self._header: Header | None = None
        self._is_broken = False

    @classmethod
    async def connect(
        cls, endpoint: Endpoint, my_node_id: str, secret: bytes, application: str, timeout_s: float = HANDSHAKE_TIMEOUT_S
    ) -> "MessageClient":
        """ChannelClosed if nobody answers there in time, HandshakeError if who answers is not of our cluster and application."""
        incarnation = new_incarnation()
        steps = Handshake(secret, application, Role.GATEWAY, my_node_id, incarnation).as_client()
        sock, address = open_socket(endpoint, my_node_id)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, address)
                await _shake_hands(sock, steps)
                opened = asyncio.open_unix_connection if sock.family == socket.AF_UNIX else asyncio.open_connection
                reader, writer = await opened(sock=sock, limit=_READ_AHEAD_BYTES)
        except OSError as error:
            sock.close()
            raise ChannelClosed(f"cannot reach {endpoint}: {error or type(error).__name__}") from error
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer, incarnation)

    async def send(self, message: dict[str, Any]) -> None:
        """Waits while the router does not read. ChannelClosed if it is gone or does not read in time."""
        if self._writer.is_closing():
            raise ChannelClosed("the channel to the router is closed")
        self._writer.writelines(encode_message(self._incarnation, message))
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._writer.drain()
        except OSError as error:
            self._writer.transport.abort()
            raise ChannelClosed(f"the router is gone: {error or 'it does not read'}") from error

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """FrameError, after which nothing more comes, for a frame that is broken or not ours."""
        if self._is_broken:
            raise StopAsyncIteration
        try:
            if self._header is None:  # kept, so that a reader that is cancelled between the two loses nothing
                self._header = self._check(await self._reader.readexactly(HEADER_BYTES))
            payload = await self._reader.readexactly(self._header.length)
            header, self._header = self._header, None
            check_payload(header, payload)
            return decode_message(payload)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise StopAsyncIteration from error
        except FrameError:
            self._is_broken = True
            self._writer.transport.abort()
            raise

    async def close(self) -> None:
        """Idempotent."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def _check(self, packed: bytes) -> Header:
        header = unpack_header(packed, MAX_MESSAGE_BYTES)
        if header.kind != FrameKind.MESSAGE or header.incarnation != self._incarnation:
            raise FrameError(f"frame of kind {header.kind}, or of another channel's life, where a message should be")
        return header


async def _shake_hands(sock: socket.socket, steps: Steps) -> None:
    loop = asyncio.get_running_loop()
    step = next(steps)
    try:
        while True:
            if isinstance(step, bytes):
                await loop.sock_sendall(sock, step)
                step = next(steps)
                continue
            received = b""
            while len(received) < step:
                chunk = await loop.sock_recv(sock, step - len(received))
                if not chunk:
                    raise HandshakeError("the router ended the handshake: it has another secret or application, or is closing")
                received += chunk
            step = steps.send(received)
    except StopIteration:
        return
