"""The in-memory channel: the same frames and rules as the others, in one process, with faults to inject.

Every frame goes through the codec, and a partial sum is overwritten with NaN at its release, so that whoever keeps a view
for too long, or counts on memory shared with the sender, fails here and not on a cluster.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from router.errors import ChannelClosed, ChannelFull
from router.transport.channel import Incoming
from router.transport.frames import Bytes, ExpertsAnswer, ExpertsRequest, FrameKind, Header, decode_frame, pack_header
from router.transport.heartbeat import Heartbeat, HeartbeatLimits
from router.transport.in_flight import InFlight, SentFrame
from router.transport.payloads import encode_answer, encode_request, view_answer, view_request
from router.transport.tickets import Ticket, Tickets

Verdict: TypeAlias = Callable[[int, int], bool]  # of (sequence, attempt)


@dataclass
class Faults:
    """What goes wrong on one channel. Mutable: a test changes it in mid-course."""

    answer_delay_s: float = 0.0
    lose_request: Verdict = lambda _sequence, _attempt: False
    lose_answer: Verdict = lambda _sequence, _attempt: False
    num_answer_copies: int = 1
    is_silent: bool = False  # PINGs stay without answer, as from a frozen process


class MemoryHost:
    """The host's end, for any number of channels. `on_frame` is called inside `send`, in the router's thread.

    Answering inside `on_frame` makes the answer ready when `send` returns; a test that keeps the Incoming instead decides
    itself when, and from which thread, the answer comes.
    """

    def __init__(self, on_frame: Callable[[Incoming], None]) -> None:
        self.on_frame = on_frame
        self.num_answered = 0
        self._channel_ids = count(1)
        self._channels: list[MemoryChannel] = []
        self._lock = threading.Lock()
        self._is_frozen = False
        self._held: list[Callable[[], None]] = []

    def connect(
        self,
        faults: Faults | None = None,
        max_frames: int = 64,
        limits: HeartbeatLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "MemoryChannel":
        """A new channel to this host; `max_frames` buffers, then ChannelFull."""
        channel = MemoryChannel(self, next(self._channel_ids), faults or Faults(), max_frames, limits or HeartbeatLimits(), clock)
        self._channels.append(channel)
        return channel

    def disconnect(self) -> None:
        """Dies: every channel sees the end of file at once."""
        for channel in self._channels:
            channel.disconnect()

    def freeze(self) -> None:
        """As a process that is stopped: what comes lies unread, PINGs too, and nothing goes out. The channels stay open."""
        with self._lock:
            self._is_frozen = True

    def thaw(self) -> None:
        """Goes on where it was: takes what lies there, in order, and sends what was ready."""
        with self._lock:
            self._is_frozen = False
            held, self._held = self._held, []
        for action in held:
            action()

    def pass_on(self, action: Callable[[], None]) -> None:
        """Carries a frame in or out, unless the host is frozen."""
        with self._lock:
            if self._is_frozen:
                self._held.append(action)
                return
        action()


class MemoryChannel:
    """A `Channel` whose host is an object in this process. Made by `MemoryHost.connect`."""

    is_on_node = True

    def __init__(
        self, host: MemoryHost, channel_id: int, faults: Faults, max_frames: int, limits: HeartbeatLimits, clock: Callable[[], float]
    ) -> None:
        self.faults = faults
        self.heartbeat = Heartbeat(limits, clock())
        self._host = host
        self._id = channel_id
        self._max_frames = max_frames
        self._clock = clock
        self._in_flight = InFlight()
        self._num_abandoned = 0
        self._partials: dict[int, ExpertsAnswer] = {}
        self._tickets = Tickets(max_frames, 1 << 62)
        self._arrived: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._is_gone = False
        self._is_closed = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def send(self, sequence: int, attempt: int, request: ExpertsRequest) -> None:
        """Calls the host's `on_frame` before it returns, unless the frame is lost."""
        self._check_open()
        frame = b"".join(encode_request(self._id, sequence, attempt, request))
        if len(self._in_flight) + self._num_abandoned >= self._max_frames:
            if not len(self._in_flight):
                self.close()
                raise ChannelClosed("every buffer of the channel was set aside after a time-out")
            raise ChannelFull(f"all {self._max_frames} buffers of the channel are in use")
        if not self._in_flight.num_waiting:
            self.heartbeat.owe(self._clock())
        self._in_flight.begin(sequence, SentFrame(attempt, *request.hidden.shape))
        if not self.faults.lose_request(sequence, attempt):
            self._host.pass_on(lambda: self._deliver_request(frame))

    def receive(self) -> ExpertsAnswer | None:
        """Answers of a host that has since disconnected still come, then ChannelClosed."""
        if self._is_closed:
            raise ChannelClosed("the channel is closed")
        while (frame := self._next_arrived()) is not None:
            self.heartbeat.hear(self._clock())
            header, payload = decode_frame(frame)
            if header.kind == FrameKind.PONG:
                self.heartbeat.num_answered = header.map_n
            elif self._in_flight.accept(header) is not None:
                answer = self._partials[header.sequence] = view_answer(header, payload)
                return answer
        self._check_open()
        if self._in_flight.num_waiting:
            self._check_heartbeat(self._clock())
        return None

    def release(self, sequence: int, *, abandoned: bool = False) -> None:
        """Overwrites the partial sum with NaN."""
        frame = self._in_flight.end(sequence)
        answer = self._partials.pop(sequence, None)
        if answer is not None and answer.partial is not None:
            answer.partial.fill_(float("nan"))
        if frame is not None and (abandoned or not frame.is_answered):
            self._num_abandoned += 1
            self._tickets.cancel(sequence)

    def fileno(self) -> int:
        """An eventfd."""
        return self._event

    def close(self) -> None:
        """Idempotent; the host's open tickets are cancelled."""
        if not self._is_closed:
            self.disconnect()
            with self._lock:
                self._is_closed = True
                os.close(self._event)

    def disconnect(self) -> None:
        """The peer is gone: what has arrived can still be received, then ChannelClosed."""
        self._tickets.cancel_all()
        with self._lock:
            self._is_gone = True
            self._wake()

    def _deliver_request(self, frame: bytes) -> None:
        if self._is_gone:
            return
        header, payload = decode_frame(frame)
        ticket = self._tickets.issue(header.sequence, header.attempt, header.length)
        assert ticket is not None, "a channel has no more frames in flight than its host has tickets"
        request = view_request(header, payload)

        def answer(answer: ExpertsAnswer) -> None:
            self._answer(ticket, answer)

        self._host.on_frame(Incoming(header.sequence, header.attempt, request, answer, ticket.cancelled, self._id))

    def _answer(self, ticket: Ticket, answer: ExpertsAnswer) -> None:
        assert (answer.sequence, answer.attempt) == (ticket.sequence, ticket.attempt), "an answer names its frame"
        frame = b"".join(encode_answer(self._id, answer))
        if not self._tickets.redeem(ticket):
            return
        self._host.num_answered += 1
        if self.faults.lose_answer(answer.sequence, answer.attempt):
            return
        for _ in range(self.faults.num_answer_copies):
            if self.faults.answer_delay_s:
                timer = threading.Timer(self.faults.answer_delay_s, self._send_back, (frame,))
                timer.daemon = True
                timer.start()
            else:
                self._send_back(frame)

    def _send_back(self, frame: Bytes) -> None:
        self._host.pass_on(lambda: self._arrive(frame))

    def _arrive(self, frame: Bytes) -> None:
        with self._lock:
            if not self._is_gone:
                self._arrived.append(bytes(frame))
                self._wake()

    def _next_arrived(self) -> bytes | None:
        with self._lock:
            if self._arrived:
                return self._arrived.popleft()
            if not self._is_gone:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._event)
            return None

    def _wake(self) -> None:
        if not self._is_closed:
            os.eventfd_write(self._event, 1)

    def _check_open(self) -> None:
        if self._is_gone:
            raise ChannelClosed("the channel is closed" if self._is_closed else "the host is gone")

    def _check_heartbeat(self, now: float) -> None:
        if self.heartbeat.is_dead(now):
            self.close()
            raise ChannelClosed("the host has not answered a heartbeat in time")
        if self.heartbeat.is_ping_due(now):
            self.heartbeat.ping(now)
            if not self.faults.is_silent:
                self._host.pass_on(self._answer_ping)

    def _answer_ping(self) -> None:
        self._arrive(pack_header(Header(FrameKind.PONG, self._id, map_n=self._host.num_answered)))
