"""What a host finds out about itself, on hosts whose speed is known and on a real one."""

import time

import pytest
import torch

from model.experts import ExpertSlots
from model.logical_expert import LogicalExpert
from router.cost_probe import measure_speed
from router.expert_server import ExpertServer
from router.transport.frames import ExpertsAnswer, FrameKind
from tests.router.expert_cluster import HIDDEN, make_experts

torch.set_num_threads(1)


class MeteredHost:
    """Answers in `per_expert_s` and `per_token_s` of a clock of its own, and now and then slower."""

    def __init__(self, per_expert_s: float, per_token_s: float) -> None:
        self.per_expert_s, self.per_token_s = per_expert_s, per_token_s
        self.now = 100.0
        self.num_frames = 0

    def __call__(self) -> float:
        return self.now

    def on_frame(self, incoming) -> None:
        self.num_frames += 1
        ids = incoming.request.expert_ids
        assert len(incoming.request.hidden) == len(ids)
        self.now += self.per_expert_s * len(ids.unique()) + self.per_token_s * ids.numel() + 0.01 * (self.num_frames % 3)
        incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, FrameKind.PARTIAL, incoming.request.hidden))


@pytest.mark.parametrize("num_experts", [1, 3, 64])
@pytest.mark.parametrize(("per_expert_s", "per_token_s"), [(0.005, 0.0002), (0.0001, 0.00001)])
def test_a_metered_host_is_measured_as_what_it_is(num_experts, per_expert_s, per_token_s):
    host = MeteredHost(per_expert_s, per_token_s)
    held = frozenset(LogicalExpert(layer, expert) for layer, most in ((1, 1), (3, num_experts)) for expert in range(most))
    speed = measure_speed(host.on_frame, held, HIDDEN, limit_s=2.0, clock=host)
    assert speed == pytest.approx((per_expert_s, per_token_s))
    assert host.now < 103.0


def test_a_real_host_measures_itself_in_a_moment():
    experts = make_experts(6)
    server = ExpertServer(ExpertSlots(experts.items()))
    try:
        started = time.monotonic()
        speed = measure_speed(server.on_frame, frozenset(experts), HIDDEN, limit_s=0.05)
        assert time.monotonic() - started < 5.0
        assert speed is not None
        assert 0 <= speed.beta_s <= speed.alpha_s + speed.beta_s < 0.1
        assert speed.alpha_s + speed.beta_s > 0
    finally:
        server.close()


def test_a_host_without_experts_or_that_does_not_hold_them_any_more_knows_nothing():
    server = ExpertServer(ExpertSlots())
    try:
        assert measure_speed(server.on_frame, frozenset(), HIDDEN) is None
        assert measure_speed(server.on_frame, frozenset({LogicalExpert(1, 0)}), HIDDEN) is None
    finally:
        server.close()
