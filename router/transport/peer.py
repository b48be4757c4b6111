"""The host's end of one stream socket: any thread writes, only the I/O thread reads and closes."""

import contextlib
import select
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from router.errors import ChannelError
from router.transport.frame_reader import Frame, FrameReader
from router.transport.frames import Bytes, FrameKind
from router.transport.outbox import Outbox

if TYPE_CHECKING:
    from router.transport.in_place import InPlaceChannel


class Peer:
    """A peer that has proved itself. A write never waits: what the socket does not take is queued, within limits."""

    def __init__(
        self,
        sock: socket.socket,
        epoll: select.epoll,
        incarnation: int,
        kinds: frozenset[FrameKind],
        max_payload_bytes: int,
        max_queued_bytes: int,
    ) -> None:
        self.incarnation = incarnation
        self._sock = sock
        self._epoll = epoll
        self._reader = FrameReader(sock, incarnation, kinds, max_payload_bytes)
        self._outbox = Outbox(sock, max_queued_bytes)
        self._lock = threading.Lock()
        self._is_closed = False
        self._waits_to_write = False
        self._in_place: InPlaceChannel | None = None

    def open_in_place(self, buffer: memoryview) -> "InPlaceChannel":
        """For machine code to read and write headers too, of requests that lie in `buffer`. Before the first read."""
        from router.transport.in_place import InPlaceChannel  # brings Numba

        self._in_place = InPlaceChannel(self.incarnation, buffer, self._reader.room)
        return self._in_place

    def write(self, buffers: Sequence[Bytes]) -> None:
        """Sends or queues one frame. To a peer that is gone it is a no-op; one that lets its queue overflow is cut off."""
        with self._lock:
            if self._is_closed:
                return
            if self._in_place is not None:
                self._in_place.output.acquire()
            try:
                self._outbox.write(buffers)
                if not self._outbox.is_empty:
                    self._watch()
            except ChannelError:
                self._break()
            self._let_go()

    def hang_up(self) -> None:
        """Ends the connection from any thread: the I/O thread sees the end of the stream and closes."""
        with self._lock:
            if not self._is_closed:
                self._break()

    def read(self, num_received: int = 0) -> list[Frame]:
        """The frames that have arrived; of the first, machine code has read so many bytes already. I/O thread only.

        ChannelError if the peer is gone or breaks the protocol.
        """
        frames = self._reader.take(num_received) if num_received else self._reader.read() or []
        if self._in_place is not None:
            self._in_place.set_between_frames(is_between=self._reader.is_between_frames)
        return frames

    def flush(self) -> None:
        """Writes what is queued, as far as it goes now. ChannelError if the peer is gone. I/O thread only."""
        with self._lock:
            self._outbox.flush()
            self._watch()
            self._let_go()

    def close(self) -> None:
        """I/O thread only: nobody else can then meet a descriptor that is closed or has become another's."""
        with self._lock:
            self._is_closed = True
            self._sock.close()

    def _break(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _let_go(self) -> None:
        if self._in_place is not None and self._outbox.is_empty:
            self._in_place.output.release()

    def _watch(self) -> None:
        waits_to_write = not self._outbox.is_empty
        if waits_to_write != self._waits_to_write:
            self._waits_to_write = waits_to_write
            self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if waits_to_write else 0))
