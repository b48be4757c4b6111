"""The router's end of the stream socket to one host: frames out without waiting for the host, frames in, heartbeats."""

import contextlib
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence

from router.errors import ChannelClosed, ChannelError, ChannelFull
from router.transport.channel import ChannelLimits
from router.transport.frame_reader import Frame, FrameReader
from router.transport.frames import ANSWER_KINDS, Bytes, FrameKind, Header, pack_header
from router.transport.heartbeat import Heartbeat
from router.transport.outbox import Outbox

_PONG = FrameKind.PONG
_KINDS = ANSWER_KINDS | {_PONG}


class HostStream:
    """One thread uses it. Any error closes it.

    Its descriptor is an epoll: readable when the socket is, when frames were read with others and wait here, and when the
    socket takes more of a frame that it did not take whole, so that a router that waits for answers only still writes on.
    """

    def __init__(self, sock: socket.socket, incarnation: int, limits: ChannelLimits) -> None:
        sock.setblocking(False)
        self.incarnation = incarnation
        self.heartbeat = Heartbeat(limits.heartbeat, time.monotonic())
        self._sock = sock
        self._send_timeout_s = limits.send_timeout_s
        self._reader = FrameReader(sock, incarnation, _KINDS, limits.max_payload_bytes)
        self._outbox = Outbox(sock, limits.max_queued_bytes)
        self._arrived: deque[Frame] = deque()
        self._is_closed = False
        self._waits_to_write = False
        self._is_ready = False
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)
        self._epoll.register(self._ready, select.EPOLLIN)
        self._ping = pack_header(Header(FrameKind.PING, incarnation))

    def send(self, buffers: Sequence[Bytes]) -> None:
        """Sends or queues one frame; waits only while the queue is full, ChannelClosed if that lasts too long."""
        self._check_open()
        try:
            try:
                self._outbox.write(buffers)
            except ChannelFull:
                self._send_when_there_is_room(buffers)
                self._show_ready()
            if self._waits_to_write or not self._outbox.is_empty:
                self._watch()
        except ChannelError:
            self.close()
            raise

    def cancel(self, sequence: int) -> None:
        """Tells the host to skip a frame; of no consequence if the host is gone."""
        if not self._is_closed:
            with contextlib.suppress(ChannelError):
                self._outbox.write([pack_header(Header(FrameKind.CANCEL, self.incarnation, sequence))])
                self._watch()

    def next_answer(self, *, is_owed: bool) -> Frame | None:
        """The next frame that is an answer, if it has arrived whole. Where one is owed, silence is met with a PING."""
        self._check_open()
        try:
            if self._waits_to_write:
                self._flush()
            while self._arrived or self._read():
                while self._arrived:
                    frame = self._arrived.popleft()
                    if frame.header.kind != _PONG:
                        if self._is_ready or self._arrived:
                            self._show_ready()
                        return frame
                    self.heartbeat.num_answered = frame.header.map_n
            if self._is_ready:
                self._show_ready()
            if is_owed:
                self._beat(time.monotonic())
        except ChannelError:
            self.close()
            raise
        return None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is queued either way, or read in part, or asked: machine code may write and read a frame between two calls."""
        reader = self._reader
        is_read = reader.is_between_frames and not self._arrived
        return is_read and self._outbox.is_empty and self.heartbeat.is_answered and not self._is_closed

    @property
    def socket_fd(self) -> int:
        """Of the stream alone."""
        return self._sock.fileno()

    @property
    def room(self) -> memoryview:
        """Where machine code reads a header to."""
        return self._reader.room

    def take(self, num_bytes: int) -> None:
        """So many bytes were read into `room`: `next_answer` goes on behind them."""
        self._check_open()
        try:
            self._arrived.extend(self._reader.take(num_bytes))
            self.heartbeat.hear(time.monotonic())
            self._show_ready()
        except ChannelError:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when `next_answer` has something to do."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._epoll.close()
            os.close(self._ready)
            self._sock.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ChannelClosed("the channel is closed")

    def _read(self) -> bool:
        """Whether anything had arrived."""
        frames = self._reader.read()
        if frames is None:
            return False
        self.heartbeat.hear(time.monotonic())
        self._arrived.extend(frames)
        return True

    def _show_ready(self) -> None:
        """Frames that have left the socket no longer make it readable: the eventfd does."""
        if bool(self._arrived) != self._is_ready:
            self._is_ready = not self._is_ready
            if self._is_ready:
                os.eventfd_write(self._ready, 1)
            else:
                os.eventfd_read(self._ready)

    def _flush(self) -> None:
        if self._outbox.flush():
            self.heartbeat.hear(time.monotonic())  # a full socket that takes more has a reader
        self._watch()

    def _watch(self) -> None:
        waits_to_write = not self._outbox.is_empty
        if waits_to_write != self._waits_to_write:
            self._waits_to_write = waits_to_write
            self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if waits_to_write else 0))

    def _beat(self, now: float) -> None:
        if self.heartbeat.is_dead(now):
            raise ChannelClosed(f"the host has not answered a heartbeat; last heard of {now - self.heartbeat.last_heard:.1f} s ago")
        if self.heartbeat.is_ping_due(now):
            self.heartbeat.ping(now)
            try:
                self._outbox.write([self._ping])
            except ChannelFull:
                return  # a host that reads nothing is asked by the frames that wait for it
            self._watch()

    def _send_when_there_is_room(self, buffers: Sequence[Bytes]) -> None:
        deadline = time.monotonic() + self._send_timeout_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | select.POLLOUT)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ChannelClosed(f"the host has not read for {self._send_timeout_s} s")
            poll.poll(left_s * 1000)
            self._outbox.flush()
            self._read()
            try:
                return self._outbox.write(buffers)
            except ChannelFull:
                continue
