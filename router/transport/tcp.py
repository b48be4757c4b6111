"""The channel between nodes: whole frames on one TCP connection, payloads checksummed."""

import socket
import time

from router.errors import ChannelFull, FrameError
from router.transport.channel import ChannelLimits
from router.transport.frames import ExpertsAnswer, ExpertsRequest
from router.transport.heartbeat import Heartbeat
from router.transport.host_stream import HostStream
from router.transport.in_flight import InFlight, SentFrame
from router.transport.payloads import encode_request, is_shared, view_answer

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 15_000


def tune(sock: socket.socket) -> None:
    """Small frames leave at once, and a peer whose node is gone is noticed though nothing is owed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class TcpChannel:
    """A `Channel` over a socket whose handshake is done."""

    is_on_node = False

    def __init__(self, sock: socket.socket, incarnation: int, limits: ChannelLimits) -> None:
        self._stream = HostStream(sock, incarnation, limits)
        self._limits = limits
        self._in_flight = InFlight()

    @property
    def heartbeat(self) -> Heartbeat:
        """The host's signs of life."""
        return self._stream.heartbeat

    def send(self, sequence: int, attempt: int, request: ExpertsRequest) -> None:
        """What the socket does not take at once is copied and follows as `receive` is called."""
        if len(self._in_flight) >= self._limits.max_frames:
            raise ChannelFull(f"{self._limits.max_frames} frames are in flight already")
        frame = encode_request(self._stream.incarnation, sequence, attempt, request)
        num_bytes = max(sum(map(len, frame)), request.hidden.numel() * 4)
        if num_bytes > self._limits.max_payload_bytes:
            raise FrameError(f"a frame of {num_bytes} bytes with its answer is over the limit of {self._limits.max_payload_bytes}")
        if not self._in_flight.num_waiting:
            self.heartbeat.owe(time.monotonic())
        self._stream.send(frame)
        self._in_flight.begin(sequence, SentFrame(attempt, *request.hidden.shape))

    def receive(self) -> ExpertsAnswer | None:
        """The partial sum lies in memory of its own."""
        while (frame := self._stream.next_answer(is_owed=self._in_flight.num_waiting > 0)) is not None:
            header, payload = frame
            try:
                if is_shared(header):
                    raise FrameError("the answer lies in a shared buffer, but a TCP channel has none")
                if self._in_flight.accept(header) is not None:
                    return view_answer(header, payload)
            except FrameError:
                self.close()
                raise
        return None

    def release(self, sequence: int, *, abandoned: bool = False) -> None:  # noqa: ARG002
        """An unanswered frame is cancelled at the host; there is no buffer to give back."""
        frame = self._in_flight.end(sequence)
        if frame is not None and not frame.is_answered:
            self._stream.cancel(sequence)

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def close(self) -> None:
        """Idempotent."""
        self._stream.close()
