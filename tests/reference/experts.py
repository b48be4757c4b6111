"""Routed experts one token and one choice at a time: the definition, in float64."""

import torch
from torch import Tensor

from model.experts import ExpertWeights


def reference_experts(experts: dict[int, ExpertWeights], hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights[t, k] * down(silu(gate x) * up x), float64; an id of -1 adds nothing."""
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for choice in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, choice])
            if expert == -1:
                continue
            gate, up = (experts[expert].gate_up.double() @ hidden[token].double()).chunk(2)
            total[token] += weights[token, choice].double() * (experts[expert].down.double() @ (gate * torch.sigmoid(gate) * up))
    return total
