"""What a non-blocking socket would not take at once: a bounded queue, written on when there is room."""

import socket
from collections import deque
from collections.abc import Sequence

from router.errors import ChannelClosed, ChannelFull
from router.transport.frames import Bytes


class Outbox:
    """Frames leave whole and in order. Not thread-safe: whoever shares one holds a lock."""

    def __init__(self, sock: socket.socket, max_bytes: int) -> None:
        self._sock = sock
        self._max_bytes = max_bytes
        self._queue: deque[memoryview] = deque()
        self._num_bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything has left."""
        return not self._queue

    def write(self, buffers: Sequence[Bytes]) -> None:
        """Writes what goes at once and queues a copy of the rest: the buffers are the caller's again.

        ChannelFull, and nothing is written, if the frame does not fit into the queue behind others. ChannelClosed if the
        peer is gone.
        """
        if not self._queue:
            num_written = self._send(buffers)
            if len(buffers) == 1 and num_written == len(buffers[0]):
                return
        elif self._num_bytes + sum(len(buffer) for buffer in buffers) > self._max_bytes:
            raise ChannelFull(f"the peer does not read: {self._num_bytes} bytes wait for it already")
        else:
            num_written = 0
        for buffer in buffers:
            if num_written >= len(buffer):
                num_written -= len(buffer)
                continue
            self._queue.append(memoryview(bytes(memoryview(buffer)[num_written:])))
            self._num_bytes += len(buffer) - num_written
            num_written = 0

    def flush(self) -> int:
        """Writes what the socket takes now; the number of bytes. ChannelClosed if the peer is gone."""
        num_flushed = 0
        while self._queue:
            first = self._queue.popleft()
            num_written = self._send([first])
            num_flushed += num_written
            if num_written < len(first):
                self._queue.appendleft(first[num_written:])
                break
        self._num_bytes -= num_flushed
        return num_flushed

    def _send(self, buffers: Sequence[Bytes]) -> int:
        try:
            return self._sock.send(buffers[0]) if len(buffers) == 1 else self._sock.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosed(f"the peer is gone: {error}") from error
