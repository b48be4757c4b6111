"""Gating against transformers' own routers, and against the one-token reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from model import cpu_threads
from model.architectures import ARCHITECTURES
from model.architectures.deepseek_v2 import DeepseekV2Config as OurV2Config
from model.architectures.deepseek_v3 import DeepseekV3Config as OurV3Config
from model.gate import Gate, GateRule, Routing
from router import gating
from tests.reference.gating import route_token
from tests.tiny_models import TINY

torch.set_num_threads(1)
HIDDEN = 12


def dense(expert_ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E] weights, 0 where not chosen: the order of the chosen does not count."""
    return torch.zeros(len(expert_ids), num_experts).scatter_(1, expert_ids, weights)


def assert_same(routing: Routing, expected_ids: Tensor, expected_weights: Tensor, num_experts: int, rtol: float = 1e-5) -> None:
    assert routing.expert_ids.dtype == torch.int64
    assert routing.weights.dtype == torch.float32
    assert all(len(set(row)) == len(row) for row in routing.expert_ids.tolist())
    expected = dense(expected_ids, expected_weights, num_experts)
    torch.testing.assert_close(dense(routing.expert_ids, routing.weights, num_experts), expected, rtol=rtol, atol=1e-7)


def assert_theirs(hidden: Tensor, gate: Gate, expected_ids: Tensor, expected_weights: Tensor) -> None:
    """Torch's way adds up as transformers does, a CPU's in another order."""
    assert_same(gating.choose_by_torch(hidden, gate), expected_ids, expected_weights, len(gate.weight), rtol=1e-6)
    assert_same(route(hidden, torch.zeros(len(hidden), dtype=torch.int64), gate), expected_ids, expected_weights, len(gate.weight))


def route(hidden: Tensor, token_ids: Tensor, gate: Gate) -> Routing:
    """As a CPU does it, once that is the same as what torch does."""
    routing = gating.route(hidden, token_ids, gate)
    by_torch = gating.choose_by_torch(hidden, gate)
    assert_same(routing, by_torch.expert_ids, by_torch.weights, len(gate.weight))
    return routing


def draw(seed: int, num_tokens: int, num_experts: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    weight = torch.randn(num_experts, HIDDEN, generator=generator) * spread
    return hidden, weight, torch.randn(num_experts, generator=generator) * 0.3


def our_config(family: str, **changes: Any) -> Any:
    raw = dict(next(spec.config for spec in TINY.values() if spec.config["model_type"] == family), **changes)
    return ARCHITECTURES[family].config_type.parse(raw, {})


seeds = st.integers(0, 2**32 - 1)
tokens = st.integers(1, 9)
spreads = st.sampled_from([0.1, 0.3, 3.0])  # with less, what adds up in another order may choose another expert


@st.composite
def grouped(draw_from: st.DrawFn) -> dict[str, int]:
    """Experts in groups of at least two, enough chosen groups for the chosen experts."""
    num_groups = draw_from(st.integers(1, 6))
    size = draw_from(st.integers(2, 6))
    top_groups = draw_from(st.integers(1, num_groups))
    top_k = draw_from(st.integers(1, top_groups * size))
    return {"n_routed_experts": num_groups * size, "n_group": num_groups, "topk_group": top_groups, "num_experts_per_tok": top_k}


@settings(max_examples=80, deadline=None)
@given(grouped(), st.sampled_from(["greedy", "group_limited_greedy"]), st.sampled_from([1.0, 16.0]), seeds, tokens, spreads, st.booleans())
def test_deepseek_v2(
    groups: dict[str, int], method: str, scale: float, seed: int, num_tokens: int, spread: float, norm_topk_prob: bool
) -> None:
    changes = {**groups, "topk_method": method, "routed_scaling_factor": scale, "norm_topk_prob": norm_topk_prob}
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(hidden_size=HIDDEN, num_attention_heads=1, **changes))
    hidden, weight, _ = draw(seed, num_tokens, groups["n_routed_experts"], spread)
    theirs.weight.data = weight
    with torch.no_grad():
        _, expected_weights, expected_ids = theirs(hidden)
    config = our_config("deepseek_v2", **changes)
    assert isinstance(config, OurV2Config)
    assert_theirs(hidden, Gate(config.gate_rule, weight), expected_ids, expected_weights)


@settings(max_examples=80, deadline=None)
@given(grouped(), st.booleans(), st.sampled_from([1.0, 2.5]), seeds, tokens, spreads)
def test_deepseek_v3(groups: dict[str, int], norm_topk_prob: bool, scale: float, seed: int, num_tokens: int, spread: float) -> None:
    changes = {**groups, "routed_scaling_factor": scale, "norm_topk_prob": norm_topk_prob}
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=HIDDEN, num_attention_heads=1, **changes))
    hidden, weight, bias = draw(seed, num_tokens, groups["n_routed_experts"], spread)
    theirs.weight.data = weight
    theirs.e_score_correction_bias = bias
    with torch.no_grad():
        _, expected_weights, expected_ids = theirs(hidden)
    config = our_config("deepseek_v3", **changes)
    assert isinstance(config, OurV3Config)
    assert_theirs(hidden, Gate(config.gate_rule, weight, bias), expected_ids, expected_weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.data(), seeds, tokens, spreads)
def test_mixtral(num_experts: int, data: st.DataObject, seed: int, num_tokens: int, spread: float) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=num_experts, num_experts_per_tok=top_k))
    hidden, weight, _ = draw(seed, num_tokens, num_experts, spread)
    theirs.weight.data = weight
    with torch.no_grad():
        _, expected_weights, expected_ids = theirs(hidden)
    rule = GateRule(top_k=top_k, score="softmax", normalize=True)
    assert_theirs(hidden, Gate(rule, weight), expected_ids, expected_weights)


@settings(max_examples=60, deadline=None)
@given(
    grouped(),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from(["max", "top2_sum"]),
    st.booleans(),
    st.booleans(),
    seeds,
    st.integers(0, 5),
)
def test_reference(
    groups: dict[str, int], score: Any, group_score: Any, is_biased: bool, normalize: bool, seed: int, num_tokens: int
) -> None:
    rule = GateRule(
        top_k=groups["num_experts_per_tok"],
        score=score,
        num_groups=groups["n_group"],
        top_groups=groups["topk_group"],
        group_score=group_score,
        masked_score=float("-inf"),
        normalize=normalize,
        scale=1.7,
    )
    hidden, weight, bias = draw(seed, num_tokens, groups["n_routed_experts"], 0.5)
    gate = Gate(rule, weight, bias if is_biased else None)
    routing = route(hidden, torch.zeros(num_tokens, dtype=torch.int64), gate)
    for row, logits in enumerate((hidden @ weight.T).tolist()):
        expected = route_token(logits, bias.tolist() if is_biased else None, rule)
        found = dict(zip(routing.expert_ids[row].tolist(), routing.weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4)


def test_scores_are_float32_whatever_the_hidden_type() -> None:
    hidden, weight, _ = draw(0, 5, 8, 0.5)
    gate = Gate(GateRule(top_k=2, score="softmax", normalize=True), weight)
    routing = route(hidden.bfloat16(), torch.zeros(5, dtype=torch.int64), gate)
    expected = route(hidden.bfloat16().float(), torch.zeros(5, dtype=torch.int64), gate)
    assert_same(routing, expected.expert_ids, expected.weights, 8)


def test_a_group_that_is_masked_to_zero_weighs_nothing() -> None:
    """V2 masks scores with 0; where more are chosen than the groups hold, the rest weigh 0, as in transformers."""
    changes = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 4, "topk_method": "group_limited_greedy"}
    hidden, weight, _ = draw(3, 6, 8, 0.5)
    routing = route(hidden, torch.zeros(6, dtype=torch.int64), Gate(our_config("deepseek_v2", **changes).gate_rule, weight))
    assert ((routing.weights > 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_biased", [True, False])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_weighs_nan_and_is_nobody_elses_trouble(score: Any, is_biased: bool, number: float) -> None:
    """Its experts are some that there are, each once: what is dispatched must be sound, and the engine fails the request after."""
    hidden, weight, bias = draw(1, 3, 12, 0.5)
    rule = GateRule(top_k=4, score=score, num_groups=3, top_groups=2, group_score="top2_sum", normalize=True)
    gate = Gate(rule, weight, bias if is_biased else None)
    sound = gating.route(hidden, torch.zeros(3, dtype=torch.int64), gate)
    hidden[1, 5] = number
    routing = gating.route(hidden, torch.zeros(3, dtype=torch.int64), gate)
    assert routing.weights[1].isnan().all()
    assert len(set(routing.expert_ids[1].tolist())) == 4
    assert routing.expert_ids[1].min() >= 0
    assert routing.expert_ids[1].max() < 12
    for row in (0, 2):
        assert torch.equal(routing.weights[row], sound.weights[row])
        assert torch.equal(routing.expert_ids[row], sound.expert_ids[row])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_prompt_of_many_tokens_in_shares(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(cpu_threads, "num_shares_of", lambda _: num_threads)
    hidden, weight, bias = draw(2, 301, 64, 0.5)
    rule = GateRule(top_k=6, score="sigmoid", num_groups=8, top_groups=3, group_score="top2_sum", normalize=True, scale=2.5)
    route(hidden, torch.zeros(301, dtype=torch.int64), Gate(rule, weight, bias))
