"""The host's end of one channel: frames from one router, each with the way to answer it."""

import logging
import mmap
import threading
from collections.abc import Callable

from router.errors import FrameError
from router.placement_map import MapVersion
from router.transport.channel import Incoming
from router.transport.frame_reader import Frame
from router.transport.frames import IS_PREFILL, SHARED, ExpertsAnswer, ExpertsRequest, FrameKind, Header, pack_fields
from router.transport.payloads import Places, encode_answer, is_shared, partial_header, view_request
from router.transport.peer import Peer
from router.transport.tickets import Ticket, Tickets

logger = logging.getLogger("shoal")


class Progress:
    """How many frames this process has answered, on all its channels. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_answered = 0

    def count(self) -> None:
        """One more."""
        with self._lock:
            self.num_answered += 1


class HostEnd:
    """One router's channel. `mapping` is its shared buffer, None over TCP. `handle` and `close` are the I/O thread's."""

    def __init__(
        self,
        peer: Peer,
        channel_id: int,
        mapping: mmap.mmap | None,
        on_frame: Callable[[Incoming], None],
        tickets: Tickets,
        progress: Progress,
    ) -> None:
        self._peer = peer
        self._id = channel_id
        self._places = None if mapping is None else Places(mapping)
        self._on_frame = on_frame
        self._tickets = tickets
        self._progress = progress

    def handle(self, frame: Frame) -> None:
        """An EXPERTS frame becomes an Incoming; a CANCEL voids one.

        FrameError if it lies about its place.
        """
        header = frame.header
        if header.kind == FrameKind.CANCEL:
            self._tickets.cancel(header.sequence)
            return
        if self._places is None:
            if is_shared(header):
                raise FrameError("the request lies in a shared buffer, but a TCP channel has none")
            request = view_request(header, frame.payload)
        else:
            if not header.flags & SHARED:
                raise FrameError("the request does not lie in the channel's shared buffer")
            place = self._places.at(header.offset, header.sizes)
            version = MapVersion(header.map_epoch, header.map_n)
            is_prefill = bool(header.flags & IS_PREFILL)
            request = ExpertsRequest(header.layer, version, place.hidden, place.expert_ids, place.weights, is_prefill)
        # A request in shared memory is held by the router's limit; one from TCP lies in memory of ours.
        ticket = self._tickets.issue(header.sequence, header.attempt, len(frame.payload))
        if ticket is None:
            self._write(ExpertsAnswer(header.sequence, header.attempt, FrameKind.BUSY, None, "too many frames of this router wait here"))
            return

        def answer(answer: ExpertsAnswer) -> None:
            self._answer(ticket, header, answer)

        try:
            self._on_frame(Incoming(header.sequence, header.attempt, request, answer, ticket.cancelled, self._id))
        except Exception as error:
            logger.exception("an expert host could not take a frame")
            answer(ExpertsAnswer(header.sequence, header.attempt, FrameKind.FAILED, None, f"the host could not take the frame: {error}"))

    def close(self) -> None:
        """The router is gone: nobody waits for what it has asked."""
        self._tickets.cancel_all()

    def _answer(self, ticket: Ticket, request: Header, answer: ExpertsAnswer) -> None:
        assert (answer.sequence, answer.attempt) == (ticket.sequence, ticket.attempt), "an answer names its frame"
        if answer.kind == FrameKind.PARTIAL:
            header = partial_header(self._peer.incarnation, answer)
            if (header.num_tokens, header.hidden_size) != (request.num_tokens, request.hidden_size):
                raise FrameError(
                    f"a partial sum [{header.num_tokens}, {header.hidden_size}] for [{request.num_tokens}, {request.hidden_size}] tokens"
                )
        if not self._tickets.redeem(ticket):
            return
        self._progress.count()
        if answer.kind == FrameKind.PARTIAL and self._places is not None:
            assert answer.partial is not None
            place = self._places.at(request.offset, request.sizes)
            place.partial.copy_(answer.partial)
            self._peer.write([pack_fields(FrameKind.PARTIAL, self._peer.incarnation, request.sequence, request.attempt, *place.told)])
        else:
            self._write(answer)

    def _write(self, answer: ExpertsAnswer) -> None:
        self._peer.write(encode_answer(self._peer.incarnation, answer))
