"""Gates: how a family turns scores into a choice of experts, as values. The arithmetic: `router.gating`, `model.cpu_gate`."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class GateRule:
    """What a family computes from the gate's logits [T, E], in float32 always.

    scores = score(logits); choice scores = scores + correction bias; where num_groups > 1 only the experts of the
    `top_groups` best groups (by `group_score` of the choice scores) stay, the others' choice scores become `masked_score`;
    the top_k of the choice scores are chosen; weights are the unbiased scores of the chosen, divided by their sum plus
    `normalize_epsilon` if `normalize`, times `scale`.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"]
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    masked_score: float = 0.0
    normalize: bool = False
    normalize_epsilon: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Gate:
    """One MoE layer's gate: weight [E, H] and correction bias [E] or None, both float32."""

    rule: GateRule
    weight: Tensor
    correction_bias: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The chosen experts of a token batch: expert_ids [T, K] int64, weights [T, K] float32."""

    expert_ids: Tensor
    weights: Tensor
