"""Reads frames from a non-blocking stream socket, however the stream is cut."""

import socket
from typing import NamedTuple

import numpy as np

from router.errors import ChannelClosed, FrameError
from router.transport.frames import HEADER_BYTES, SHARED, FrameKind, Header, check_payload, unpack_header

# Many headers and small payloads in one system call; larger payloads go straight into memory of their own.
_BUFFER_BYTES = 16 << 10


class Frame(NamedTuple):
    """A checked header and the payload that followed it, empty where it lies in shared memory."""

    header: Header
    payload: memoryview


_NO_PAYLOAD = memoryview(bytearray())


class FrameReader:
    """The frames of one channel life, of the kinds that its peer may send. Memory is taken only for a size that was checked."""

    def __init__(self, sock: socket.socket, incarnation: int, kinds: frozenset[FrameKind], max_payload_bytes: int) -> None:
        self._sock = sock
        self._incarnation = incarnation
        self._kinds = kinds
        self._max_payload_bytes = max_payload_bytes
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._first = self._buffer[:HEADER_BYTES]
        self._num_buffered = 0
        self._header: Header | None = None
        self._payload = _NO_PAYLOAD
        self._num_filled = 0

    @property
    def room(self) -> memoryview:
        """Where a header that begins a frame is read to."""
        return self._first

    @property
    def is_between_frames(self) -> bool:
        """Whether all that was read were whole frames."""
        return self._header is None and not self._num_buffered

    def take(self, num_bytes: int) -> list[Frame]:
        """The frames that so many bytes complete which somebody else has read into `room`, between frames. Errors as of `read`."""
        assert self.is_between_frames
        return self._parse(num_bytes)

    def read(self) -> list[Frame] | None:
        """The frames that one read completes; None if nothing has arrived.

        ChannelClosed at the end of the stream. FrameError for a frame that is broken, of another channel life, or not the
        peer's to send; then nothing more can be read.
        """
        if self._header is not None:
            target = self._payload[self._num_filled :]
        else:
            target = self._buffer[self._num_buffered :] if self._num_buffered else self._buffer
        try:
            num_bytes = self._sock.recv_into(target)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosed(f"the peer is gone: {error}") from error
        if num_bytes == 0:
            raise ChannelClosed("the peer is gone")
        if self._header is None:
            return self._parse(self._num_buffered + num_bytes)
        self._num_filled += num_bytes
        return [self._finish()] if self._num_filled == self._header.length else []

    def _parse(self, end: int) -> list[Frame]:
        frames: list[Frame] = []
        start = 0
        while end - start >= HEADER_BYTES:
            header = self._next_header(start)
            start += HEADER_BYTES
            if header.flags & SHARED or not header.length:
                if header.payload_crc:
                    raise FrameError("frame with a checksum of a payload that does not follow it")
                frames.append(Frame(header, _NO_PAYLOAD))
                if start == end:  # a lone frame, as in most decode steps
                    self._num_buffered = 0
                    return frames
                continue
            self._header = header
            self._payload = np.empty(header.length, np.uint8).data
            self._num_filled = min(end - start, header.length)
            self._payload[: self._num_filled] = self._buffer[start : start + self._num_filled]
            start += self._num_filled
            if self._num_filled < header.length:
                break
            frames.append(self._finish())
        self._num_buffered = end - start
        if start and self._num_buffered:
            self._buffer[: self._num_buffered] = bytes(self._buffer[start:end])
        return frames

    def _finish(self) -> Frame:
        assert self._header is not None
        frame = Frame(self._header, self._payload)
        self._header, self._payload = None, _NO_PAYLOAD
        check_payload(frame.header, frame.payload)
        return frame

    def _next_header(self, start: int) -> Header:
        packed = self._buffer[start : start + HEADER_BYTES] if start else self._first
        header = unpack_header(packed, self._max_payload_bytes)
        if header.kind not in self._kinds:
            raise FrameError(f"the peer may not send frames of kind {header.kind}")
        if header.incarnation != self._incarnation:
            raise FrameError("frame of another channel's life")
        return header
