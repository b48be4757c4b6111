"""The host's side of the token path: a bounded queue of frames, and one compute thread that serves whatever has arrived."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from model.errors import ExpertNotHeld
from model.experts import ExpertSlots
from router.transport.channel import Incoming
from router.transport.frames import ExpertsAnswer, ExpertsRequest, FrameKind

logger = logging.getLogger("shoal")


@dataclass(frozen=True)
class ServerLimits:
    """`max_queued_tokens` are the credits, shared by all routers; `max_prefill_tokens` bounds how long one call keeps decodes waiting."""

    max_queued_tokens: int = 65536
    max_prefill_tokens: int = 1024
    max_prefill_wait_s: float = 0.25  # then every other call is a prefill, however many decodes there are
    threads: int | None = None  # torch threads of the compute thread; None: as they are
    max_in_place_bytes: int = 64 << 20  # weights that a frame answered on the spot may read: some milliseconds of a CPU's memory


@dataclass
class ServerStats:
    """Sums since the last `take_stats`; times in seconds, `queue_wait_s` over all frames that were served."""

    busy_s: float = 0.0
    queue_wait_s: float = 0.0
    num_calls: float = 0.0
    num_frames: float = 0.0
    num_tokens: float = 0.0
    num_busy: float = 0.0
    num_not_here: float = 0.0
    num_failed: float = 0.0
    num_cancelled: float = 0.0


@dataclass(slots=True, eq=False)
class _Frame:
    """One frame in hand; a prefill frame may take several calls, `done` [n, H] each."""

    incoming: Incoming
    arrived: float
    num_done: int = 0
    done: list[Tensor] = field(default_factory=list)

    @property
    def request(self) -> ExpertsRequest:
        return self.incoming.request

    @property
    def num_tokens(self) -> int:
        return len(self.incoming.request.hidden)


class ExpertServer:
    """Serves frames of any number of routers from one set of slots; never waits for a router or for a fuller batch.

    `on_frame` may be called from any thread. Frames of one layer that have arrived are computed in one call. A frame that
    names an expert which is not held is answered NOT_HERE before anything is computed.
    """

    def __init__(self, slots: ExpertSlots, limits: ServerLimits | None = None, device: torch.device | None = None) -> None:
        self.limits = limits or ServerLimits()
        self._slots = slots
        self._device = device or torch.device("cpu")
        # For the thread that reads frames: to wake the compute thread for a decode step's few tokens costs as much as an expert.
        self.in_place = slots.open_in_place(self.limits.max_in_place_bytes) if self._device.type == "cpu" else None
        self._told_in_place = (0, 0, 0.0)
        self._arrived: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()
        self._decodes: deque[_Frame] = deque()
        self._prefills: deque[_Frame] = deque()
        self._lock = threading.Lock()
        self._num_queued_tokens = 0
        self._stats = ServerStats()
        self._was_prefill = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._thread.start()

    def on_frame(self, incoming: Incoming) -> None:
        """Takes a frame, or answers BUSY at once: past the credits, or when closing. One frame is taken however large it is."""
        num_tokens = len(incoming.request.hidden)
        with self._lock:
            fits = not self._num_queued_tokens or self._num_queued_tokens + num_tokens <= self.limits.max_queued_tokens
            is_taken = fits and not self._is_closed
            if is_taken:
                self._num_queued_tokens += num_tokens
                self._arrived.put(_Frame(incoming, time.perf_counter()))
            else:
                self._stats.num_busy += 1
        if not is_taken:
            _answer(incoming, FrameKind.BUSY, reason="the host is closing" if self._is_closed else "the host's queue is full")

    def take_stats(self) -> dict[str, float]:
        """What was done since the last call, and `queued_tokens` now. Any thread."""
        with self._lock:
            stats, self._stats = self._stats, ServerStats()
            queued = self._num_queued_tokens
            self._add_in_place(stats)
        return {entry.name: getattr(stats, entry.name) for entry in fields(stats)} | {"queued_tokens": float(queued)}

    def _add_in_place(self, stats: ServerStats) -> None:
        """What machine code has answered since it was last asked: a frame a call."""
        if self.in_place is None:
            return
        before = self._told_in_place
        now = self._told_in_place = (self.in_place.num_frames, self.in_place.num_tokens, self.in_place.busy_s)
        stats.num_calls += now[0] - before[0]
        stats.num_frames += now[0] - before[0]
        stats.num_tokens += now[1] - before[1]
        stats.busy_s += now[2] - before[2]

    @property
    def is_alive(self) -> bool:
        """False once the compute thread ended, for the health check."""
        return self._thread.is_alive()

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the call that it is in; frames that wait are answered BUSY. Idempotent."""
        if self.in_place is not None:
            self.in_place.close()
        with self._lock:
            self._is_closed = True
        self._arrived.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    # -- the compute thread

    def _run(self) -> None:
        if self.limits.threads is not None:
            torch.set_num_threads(self.limits.threads)
        with torch.inference_mode():
            while self._take_arrived():
                self._serve(self._next_batch())
        for frame in (*self._decodes, *self._prefills):
            self._finish(frame, FrameKind.BUSY, reason="the host is closing")

    def _take_arrived(self) -> bool:
        """Sorts everything that has arrived; waits only if there is nothing else to do. False when closing."""
        wait = not self._decodes and not self._prefills
        while True:
            try:
                frame = self._arrived.get(block=wait)
            except queue.Empty:
                return not self._is_closed
            if frame is None:
                wait = not self._is_closed  # the end of an earlier close()
                continue
            (self._prefills if frame.request.is_prefill else self._decodes).append(frame)
            wait = False

    def _next_batch(self) -> list[_Frame]:
        """All decodes of the layer whose decode came first; or prefills of one layer, as many as one call takes."""
        now = time.perf_counter()
        is_overdue = bool(self._prefills) and now - self._prefills[0].arrived > self.limits.max_prefill_wait_s
        if self._decodes and (self._was_prefill or not is_overdue):
            self._was_prefill = False
            return _take_mergeable(self._decodes, None)
        self._was_prefill = True
        return _take_mergeable(self._prefills, self.limits.max_prefill_tokens) if self._prefills else []

    def _serve(self, batch: list[_Frame]) -> None:
        served = [frame for frame in batch if self._is_wanted(frame)]
        if not served:
            return
        started = time.perf_counter()
        sizes = self._sizes(served)
        try:
            partials = self._compute(served, sizes)
        except Exception as error:
            if len(served) > 1:  # one bad frame must not fail its neighbours
                for frame in served:
                    self._serve([frame])
            else:
                self._refuse(served[0], error)
            return
        now = time.perf_counter()
        with self._lock:
            self._stats.busy_s += now - started
            self._stats.num_calls += 1
            self._stats.num_tokens += sum(sizes)
            self._stats.queue_wait_s += sum(started - frame.arrived for frame in served if not frame.num_done)
        for frame, size, partial in zip(served, sizes, partials, strict=True):
            frame.num_done += size
            if frame.num_done < frame.num_tokens:
                frame.done.append(partial)
                self._prefills.appendleft(frame)
            else:
                self._finish(frame, FrameKind.PARTIAL, torch.cat([*frame.done, partial]) if frame.done else partial)

    def _sizes(self, frames: list[_Frame]) -> list[int]:
        """Tokens of each frame in this call: all that is left, but no more prefill tokens than the limit in all."""
        if not frames[0].request.is_prefill:
            return [frame.num_tokens for frame in frames]
        room, sizes = self.limits.max_prefill_tokens, []
        for frame in frames:
            sizes.append(min(frame.num_tokens - frame.num_done, room))
            room -= sizes[-1]
        return sizes

    def _compute(self, frames: list[_Frame], sizes: list[int]) -> Sequence[Tensor]:
        """One call over the next `sizes` tokens of the frames, all of one layer; the partial sums of each."""
        requests = [frame.request for frame in frames]
        spans = [slice(frame.num_done, frame.num_done + size) for frame, size in zip(frames, sizes, strict=True)]
        hidden = _join([request.hidden[span] for request, span in zip(requests, spans, strict=True)]).to(self._device)
        expert_ids = _join([request.expert_ids[span] for request, span in zip(requests, spans, strict=True)])
        weights = _join([request.weights[span] for request, span in zip(requests, spans, strict=True)])
        partial = self._slots.forward(requests[0].layer, hidden, expert_ids, weights).to("cpu")
        return torch.split(partial, sizes)

    def _is_wanted(self, frame: _Frame) -> bool:
        if not frame.incoming.cancelled():
            return True
        self._forget(frame, "num_cancelled")
        return False

    def _refuse(self, frame: _Frame, error: Exception) -> None:
        """Nothing was computed, or what was is lost. The slots say which experts they lack before they compute."""
        if isinstance(error, ExpertNotHeld):
            self._finish(frame, FrameKind.NOT_HERE, reason=str(error))
            return
        layer = frame.request.layer
        logger.error("layer %d of a frame with %d tokens failed", layer, frame.num_tokens, exc_info=error)
        first_line = (str(error).splitlines() or [""])[0]
        self._finish(frame, FrameKind.FAILED, reason=f"layer {layer} raised {type(error).__name__}: {first_line}")

    def _finish(self, frame: _Frame, kind: FrameKind, partial: Tensor | None = None, reason: str = "") -> None:
        counters = {
            FrameKind.PARTIAL: "num_frames",
            FrameKind.NOT_HERE: "num_not_here",
            FrameKind.FAILED: "num_failed",
            FrameKind.BUSY: "num_busy",
        }
        self._forget(frame, counters[kind])
        _answer(frame.incoming, kind, partial, reason)

    def _forget(self, frame: _Frame, counter: str) -> None:
        with self._lock:
            self._num_queued_tokens -= frame.num_tokens
            setattr(self._stats, counter, getattr(self._stats, counter) + 1)


def _take_mergeable(frames: deque[_Frame], max_tokens: int | None) -> list[_Frame]:
    """The first frame and all that can be computed with it, up to `max_tokens` begun; the others stay in their order."""
    kind = _kind_of(frames[0].request)
    taken: list[_Frame] = []
    left: list[_Frame] = []
    num_tokens = 0
    for frame in frames:
        fits = max_tokens is None or num_tokens < max_tokens
        if fits and _kind_of(frame.request) == kind:
            taken.append(frame)
            num_tokens += frame.num_tokens - frame.num_done
        else:
            left.append(frame)
    frames.clear()
    frames.extend(left)
    return taken


def _kind_of(request: ExpertsRequest) -> tuple[int, int, torch.dtype, int]:
    """What requests that one call computes have in common."""
    return request.layer, request.hidden.shape[1], request.hidden.dtype, request.expert_ids.shape[1]


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _answer(incoming: Incoming, kind: FrameKind, partial: Tensor | None = None, reason: str = "") -> None:
    try:
        incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, kind, partial, reason))
    except Exception:  # whatever it is, the other routers' frames are still to be served
        logger.exception("an answer could not be given")
