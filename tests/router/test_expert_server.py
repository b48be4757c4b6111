"""The host's compute thread: merged by layer, decodes first, bounded, exact for each frame, and never stuck."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cpu_in_place import BLOCK_WORDS, compute_in_place
from model.experts import ExpertSlots
from model.logical_expert import LogicalExpert
from router.expert_server import ExpertServer, ServerLimits
from router.placement_map import MapVersion
from router.transport.channel import Incoming
from router.transport.frames import ExpertsAnswer, ExpertsRequest, FrameKind
from tests.router.expert_cluster import HIDDEN, make_batch, make_experts, wait_until

torch.set_num_threads(1)

NUM_EXPERTS = 6


class WatchedSlots(ExpertSlots):
    """Slots that note each call, and stand still while `gate` is closed."""

    def __init__(self, experts) -> None:
        super().__init__(experts)
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[int, int]] = []  # layer, tokens
        self.begun = 0
        self.poison: float | None = None

    def forward(self, layer, hidden, expert_ids, weights):
        self.begun += 1
        assert self.gate.wait(10)
        self.calls.append((layer, len(hidden)))
        if self.poison is not None and (hidden == self.poison).any():
            raise RuntimeError("the kernel gave up\nwith a second line")
        return super().forward(layer, hidden, expert_ids, weights)


@dataclass(eq=False)
class Asked:
    """A frame that a test sent, and what came back."""

    request: ExpertsRequest
    answers: list[ExpertsAnswer] = field(default_factory=list)
    is_cancelled: bool = False

    @property
    def kind(self) -> FrameKind | None:
        return self.answers[0].kind if self.answers else None


class Bench:
    """A server with what was asked of it."""

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.slots = WatchedSlots(make_experts(NUM_EXPERTS).items())
        self.reference = ExpertSlots(make_experts(NUM_EXPERTS).items())
        self.server = ExpertServer(self.slots, limits)
        self.asked: list[Asked] = []

    def ask(
        self, num_tokens: int = 2, layer: int = 1, is_prefill: bool = False, seed: int = 0, top_k: int = 2, expert: int | None = None
    ) -> Asked:
        hidden, routing = make_batch(num_tokens, NUM_EXPERTS, top_k, seed)
        ids = routing.expert_ids.to(torch.int16) if expert is None else torch.full((num_tokens, top_k), expert, dtype=torch.int16)
        asked = Asked(ExpertsRequest(layer, MapVersion(1, 1), hidden, ids, routing.weights, is_prefill))
        self.send(asked)
        return asked

    def send(self, asked: Asked) -> None:
        self.asked.append(asked)
        number = len(self.asked)
        self.server.on_frame(Incoming(number, 7, asked.request, asked.answers.append, lambda: asked.is_cancelled))

    def hold(self) -> Asked:
        """Closes the gate with one frame behind it: whatever is asked now waits."""
        self.slots.gate.clear()
        begun = self.slots.begun
        first = self.ask(1, layer=1)
        wait_until(lambda: self.slots.begun == begun + 1)
        return first

    def open(self) -> None:
        self.slots.gate.set()

    def settle(self) -> None:
        wait_until(lambda: all(asked.answers or asked.is_cancelled for asked in self.asked))

    def check(self, asked: Asked) -> None:
        """Answered once, with what the slots alone would give."""
        (answer,) = asked.answers
        assert answer.kind == FrameKind.PARTIAL
        request = asked.request
        expected = self.reference.forward(request.layer, request.hidden, request.expert_ids, request.weights)
        torch.testing.assert_close(answer.partial, expected, atol=1e-5, rtol=1e-5)
        assert (answer.sequence, answer.attempt) == (self.asked.index(asked) + 1, 7)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self.server.close()
        assert not self.server.is_alive


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 3]), st.booleans(), st.integers(1, 3)), min_size=1, max_size=12),
    st.booleans(),
)
def test_every_frame_gets_its_own_partial_sum(frames, is_held: bool):
    with Bench(ServerLimits(max_prefill_tokens=8)) as bench:
        if is_held:
            bench.hold()
        for seed, (num_tokens, layer, is_prefill, top_k) in enumerate(frames):
            bench.ask(num_tokens, layer, is_prefill, seed, top_k)
        bench.open()
        bench.settle()
        for asked in bench.asked:
            bench.check(asked)
        stats = bench.server.take_stats()
        assert stats["num_frames"] == len(bench.asked)
        assert stats["num_tokens"] == sum(len(asked.request.hidden) for asked in bench.asked)
        assert stats["num_calls"] == len(bench.slots.calls)
        assert stats["busy_s"] > 0
        assert stats["queue_wait_s"] > 0
        assert stats["queued_tokens"] == 0


def test_frames_of_one_layer_are_one_call_and_none_waits_for_more():
    with Bench() as bench:
        alone = bench.ask(3)
        bench.settle()
        bench.hold()
        for layer in (3, 1, 3, 1, 3):
            bench.ask(2, layer)
        bench.open()
        bench.settle()
        bench.check(alone)
        assert bench.slots.calls == [(1, 3), (1, 1), (3, 6), (1, 4)]


def test_decodes_go_before_prefills_whose_calls_are_capped():
    with Bench(ServerLimits(max_prefill_tokens=4, max_prefill_wait_s=100)) as bench:
        bench.hold()
        bench.ask(6, is_prefill=True)
        bench.ask(3, is_prefill=True)
        bench.ask(3, layer=3)
        bench.ask(2)
        bench.open()
        bench.settle()
        assert bench.slots.calls == [(1, 1), (3, 3), (1, 2), (1, 4), (1, 4), (1, 1)]


def test_an_overdue_prefill_takes_every_other_call():
    with Bench(ServerLimits(max_prefill_tokens=4, max_prefill_wait_s=0.0)) as bench:
        bench.hold()
        bench.ask(10, is_prefill=True)
        bench.ask(1, layer=1)
        bench.ask(1, layer=3)
        bench.open()
        bench.settle()
        assert bench.slots.calls == [(1, 1), (1, 4), (1, 1), (1, 4), (3, 1), (1, 2)]


def test_busy_past_the_credits_and_one_large_frame_is_always_taken():
    with Bench(ServerLimits(max_queued_tokens=5)) as bench:
        large = bench.ask(50)
        bench.settle()
        first = bench.hold()
        fits, too_many, still_fits = bench.ask(3), bench.ask(2), bench.ask(1)
        assert too_many.kind == FrameKind.BUSY  # at once, while the others are still waiting
        assert not fits.answers
        bench.open()
        bench.settle()
        for asked in (large, first, fits, still_fits):
            bench.check(asked)
        again = bench.ask(2)
        bench.settle()
        bench.check(again)
        assert bench.server.take_stats()["num_busy"] == 1


@pytest.mark.parametrize("unknown", [NUM_EXPERTS, 32767, -2])
def test_an_expert_that_is_not_held_is_not_here_and_its_neighbours_are_served(unknown: int):
    with Bench() as bench:
        bench.hold()
        before, stranger, after = bench.ask(2, seed=1), bench.ask(2, expert=unknown), bench.ask(2, seed=2)
        other_layer = bench.ask(2, layer=2)
        bench.open()
        bench.settle()
        bench.check(before)
        bench.check(after)
        assert stranger.kind == other_layer.kind == FrameKind.NOT_HERE
        assert str(unknown) in stranger.answers[0].reason
        assert stranger.answers[0].partial is None


def test_what_was_dropped_is_not_here_and_what_was_loaded_is():
    with Bench() as bench:
        expert = LogicalExpert(1, 2)
        bench.slots.unload(expert)
        gone = bench.ask(1, expert=2)
        bench.settle()
        bench.slots.load(expert, make_experts(NUM_EXPERTS)[expert])
        back = bench.ask(1, expert=2)
        bench.settle()
        assert gone.kind == FrameKind.NOT_HERE
        bench.check(back)


def test_a_failing_frame_is_told_in_one_sentence_and_its_neighbours_are_served(caplog):
    with Bench() as bench:
        bench.slots.poison = 1000.0
        bench.hold()
        healthy = bench.ask(2, seed=1)
        sick = Asked(healthy.request.__class__(1, MapVersion(1, 1), torch.full((2, HIDDEN), 1000.0), *_choices(2)))
        bench.send(sick)
        also_healthy = bench.ask(3, seed=2)
        bench.open()
        bench.settle()
        bench.check(healthy)
        bench.check(also_healthy)
        (answer,) = sick.answers
        assert (answer.kind, answer.reason) == (FrameKind.FAILED, "layer 1 raised RuntimeError: the kernel gave up")
        assert "Traceback" in caplog.text
        assert bench.server.take_stats()["num_failed"] == 1


def test_frames_of_another_width_or_type_are_not_merged():
    with Bench() as bench:
        bench.hold()
        right = bench.ask(2)
        wrong_width = Asked(ExpertsRequest(1, MapVersion(1, 1), torch.ones(2, HIDDEN + 1), *_choices(2)))
        bench.send(wrong_width)
        other_type = Asked(ExpertsRequest(1, MapVersion(1, 1), torch.ones(2, HIDDEN, dtype=torch.bfloat16), *_choices(2)))
        bench.send(other_type)
        bench.open()
        bench.settle()
        bench.check(right)
        bench.check(other_type)
        assert wrong_width.kind == FrameKind.FAILED


def _choices(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    _, routing = make_batch(num_tokens, NUM_EXPERTS, 2)
    return routing.expert_ids.to(torch.int16), routing.weights


def test_cancelled_frames_are_skipped_and_their_credits_returned():
    with Bench(ServerLimits(max_queued_tokens=10)) as bench:
        bench.hold()
        cancelled = bench.ask(9)
        cancelled.is_cancelled = True
        bench.open()
        wait_until(lambda: bench.server.take_stats()["queued_tokens"] == 0)
        served = bench.ask(10)
        bench.settle()
        bench.check(served)
        assert not cancelled.answers


def test_an_answer_that_cannot_be_given_stops_nothing(caplog):
    with Bench() as bench:
        asked = Asked(bench.ask(1).request)

        def answer(_: ExpertsAnswer) -> None:
            raise OSError("the router is gone")

        bench.server.on_frame(Incoming(99, 1, asked.request, answer))
        later = bench.ask(2)
        bench.settle()
        bench.check(later)
        assert "an answer could not be given" in caplog.text


def test_close_refuses_what_waits_and_what_comes_and_may_be_repeated():
    with Bench() as bench:
        first = bench.hold()
        waiting = [bench.ask(2, layer) for layer in (1, 3)] + [bench.ask(9, is_prefill=True)]
        closing = threading.Thread(target=bench.server.close)
        closing.start()
        wait_until(lambda: bench.server._is_closed)
        late = bench.ask(1)
        assert late.kind == FrameKind.BUSY
        bench.open()
        closing.join(10)
        bench.check(first)
        assert [asked.kind for asked in waiting] == [FrameKind.BUSY] * 3
        assert not bench.server.is_alive
        bench.server.close()


def test_close_does_not_wait_for_a_call_that_hangs():
    with Bench() as bench:
        bench.hold()
        bench.server.close(timeout_s=0.05)
        assert bench.server.is_alive
        assert bench.ask(1).kind == FrameKind.BUSY


def ask_in_place(server, num_tokens, top_k=2):
    """As a listener's thread does: (whether it was computed, the partial sums, the request)."""
    hidden, routing = make_batch(num_tokens, NUM_EXPERTS, top_k)
    ids, partial, block = routing.expert_ids.to(torch.int16), torch.empty(hidden.shape), np.empty(BLOCK_WORDS, np.int64)
    places = [tensor.data_ptr() for tensor in (hidden, ids, routing.weights, partial)]
    is_done = compute_in_place(server.in_place.address, block, 1, *places, *hidden.shape, top_k)
    return is_done, partial, ExpertsRequest(1, MapVersion(1, 1), hidden, ids, routing.weights)


@pytest.fixture
def open_server():
    servers = []

    def start(limits=None):
        servers.append(ExpertServer(ExpertSlots(make_experts(NUM_EXPERTS).items()), limits))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_few_tokens_are_computed_in_place_and_counted(open_server):
    server = open_server()
    is_done, partial, request = ask_in_place(server, 3)
    assert is_done
    expected = ExpertSlots(make_experts(NUM_EXPERTS).items()).forward(1, request.hidden, request.expert_ids, request.weights)
    torch.testing.assert_close(partial, expected, atol=1e-5, rtol=1e-5)
    stats = server.take_stats()
    assert (stats["num_frames"], stats["num_calls"], stats["num_tokens"]) == (1, 1, 3)
    assert stats["busy_s"] > 0
    stats = server.take_stats()
    assert (stats["num_frames"], stats["num_tokens"], stats["busy_s"]) == (0, 0, 0)


def test_what_would_hold_up_heartbeats_is_not_computed_in_place(open_server):
    server = open_server(ServerLimits(max_in_place_bytes=1))
    assert not ask_in_place(server, 1)[0]
    assert server.take_stats()["num_calls"] == 0


def test_nothing_is_computed_in_place_once_closed_nor_by_slots_with_a_forward_of_their_own(open_server):
    server = open_server()
    assert ask_in_place(server, 1)[0]
    server.close()
    assert not ask_in_place(server, 1)[0]
    with Bench() as bench:
        assert bench.server.in_place is None
