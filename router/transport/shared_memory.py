"""The channel on one node: payloads in a memfd that both map, headers over the Unix socket, which are the wake-up too.

The descriptor is passed over the socket and nothing has a name, so nothing is left behind however either side dies. The
file is sealed against shrinking before it is passed: no peer can make the other fault on memory that is gone.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable

from router.errors import ChannelClosed, ChannelFull, FrameError, HandshakeError
from router.transport.buffer_pool import BufferPool
from router.transport.channel import ChannelLimits
from router.transport.frames import IS_PREFILL, MAGIC, SHARED, Bytes, ExpertsAnswer, ExpertsRequest, FrameKind, Sizes, pack_fields
from router.transport.heartbeat import Heartbeat
from router.transport.host_stream import HostStream
from router.transport.in_flight import InFlight, SentFrame
from router.transport.payloads import Place, Places, sizes_of, view_answer

_ATTACH = struct.Struct("<4sQ")
ATTACH_BYTES = _ATTACH.size
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def pass_buffer(sock: socket.socket, num_bytes: int) -> mmap.mmap:
    """Creates a buffer and passes it to the host at the other end of a blocking Unix socket."""
    fd = os.memfd_create("shoal-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        mapping = mmap.mmap(fd, num_bytes)
        socket.send_fds(sock, [_ATTACH.pack(MAGIC, num_bytes)], [fd])
    finally:
        os.close(fd)
    return mapping


def map_buffer(message: Bytes, fds: list[int], max_bytes: int) -> mmap.mmap:
    """The host's mapping of a buffer that was passed to it; closes `fds`. HandshakeError if it is not a sound one."""
    try:
        magic, num_bytes = _ATTACH.unpack(message)
        if magic != MAGIC or len(fds) != 1:
            raise HandshakeError(f"expected one shared buffer, got {len(fds)} descriptors")
        if not 0 < num_bytes <= max_bytes:
            raise HandshakeError(f"a shared buffer of {num_bytes} bytes, the limit is {max_bytes}")
        try:
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
        except OSError as error:
            raise HandshakeError(f"the shared buffer is no memfd: {error}") from error
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fds[0]).st_size != num_bytes:
            raise HandshakeError("the shared buffer is not sealed, or not of the size that was declared")
        return mmap.mmap(fds[0], num_bytes)
    finally:
        for fd in fds:
            os.close(fd)


class SharedMemoryChannel:
    """A `Channel` over a Unix socket whose handshake is done and the buffer that was passed over it.

    A buffer holds a request and, from `shared_bytes_of` on, the room for its partial sum.
    """

    is_on_node = True

    def __init__(self, sock: socket.socket, incarnation: int, mapping: mmap.mmap, limits: ChannelLimits) -> None:
        self.stream = HostStream(sock, incarnation, limits)
        self.mapping = mapping
        self._places = Places(mapping)
        self._max_frames = limits.max_frames
        self.pool = BufferPool(len(mapping))
        self._in_flight = InFlight()
        self.make_room: Callable[[], None] = lambda: None  # called where the pool is used up

    @property
    def heartbeat(self) -> Heartbeat:
        """The host's signs of life."""
        return self.stream.heartbeat

    def send(self, sequence: int, attempt: int, request: ExpertsRequest) -> None:
        """Copies the tensors into a buffer, sends its place.

        ChannelClosed, so that a new channel is opened, when time-outs have set aside what this frame would need.
        """
        sizes, num_bytes, shared_bytes = sizes_of(request)
        if shared_bytes > self.pool.num_bytes:
            raise FrameError(f"a frame of {shared_bytes} bytes with its answer is larger than the channel's {self.pool.num_bytes}")
        offset = self._allocate(shared_bytes)
        place = self._places.at(offset, sizes)
        place.write(request)
        if not self._in_flight.num_waiting:
            self.heartbeat.owe(time.monotonic())
        epoch, n = request.map_version
        flags = SHARED | IS_PREFILL if request.is_prefill else SHARED
        life = self.stream.incarnation
        header = pack_fields(FrameKind.EXPERTS, life, sequence, attempt, epoch, n, request.layer, *sizes, flags, offset, num_bytes, 0)
        self.stream.send([header])
        frame = SentFrame(attempt, sizes.num_tokens, sizes.hidden_size, offset, place.answer_offset, place.partial)
        self._in_flight.begin(sequence, frame)

    def place_of(self, offset: int, sizes: Sizes) -> Place:
        """Where a frame of these sizes lies, and its answer."""
        return self._places.at(offset, sizes)

    def take_over(self, sequence: int, place: Place, offset: int, sent_at: float) -> None:
        """A frame that machine code has sent, first attempt, from a buffer of the pool: from here on it is one that `send` has sent."""
        if not self._in_flight.num_waiting:
            self.heartbeat.owe(sent_at)
        num_tokens, hidden_size = place.partial.shape
        self._in_flight.begin(sequence, SentFrame(1, num_tokens, hidden_size, offset, place.answer_offset, place.partial))

    def receive(self) -> ExpertsAnswer | None:
        """The partial sum is a view of the buffer."""
        while (arrived := self.stream.next_answer(is_owed=self._in_flight.num_waiting > 0)) is not None:
            header, payload = arrived
            try:
                frame = self._in_flight.accept(header)
                if frame is None:
                    continue
                if header.kind != FrameKind.PARTIAL:
                    return view_answer(header, payload)
                if not header.flags & SHARED or header.offset != frame.answer_offset:
                    raise FrameError(f"the host's answer lies at {header.offset} of the shared buffer, not at {frame.answer_offset}")
                return ExpertsAnswer(header.sequence, header.attempt, FrameKind.PARTIAL, frame.answer)
            except FrameError:
                self.close()
                raise
        return None

    def release(self, sequence: int, *, abandoned: bool = False) -> None:
        """Of an unanswered frame the buffer is set aside and the host told to skip it."""
        frame = self._in_flight.end(sequence)
        if frame is None:
            return
        if frame.is_answered and not abandoned:
            self.pool.release(frame.buffer)
            return
        self.pool.set_aside(frame.buffer)
        if not frame.is_answered:
            self.stream.cancel(sequence)

    def fileno(self) -> int:
        """Of the stream."""
        return self.stream.fileno()

    def close(self) -> None:
        """Idempotent. The mapping goes with the last view of it."""
        self.stream.close()
        self.make_room = lambda: None

    def _allocate(self, num_bytes: int) -> int:
        if len(self._in_flight) >= self._max_frames:
            raise ChannelFull(f"{self._max_frames} frames are in flight already")
        with contextlib.suppress(ChannelFull):
            return self.pool.allocate(num_bytes)
        self.make_room()
        try:
            return self.pool.allocate(num_bytes)
        except ChannelFull as error:
            if len(self._in_flight):
                raise
            self.close()
            raise ChannelClosed(f"time-outs have used the channel up: {error}") from error
