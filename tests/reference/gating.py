"""Gating one token at a time, straight from `GateRule`'s words."""

import math
from collections.abc import Sequence

from model.gate import GateRule


def route_token(logits: Sequence[float], bias: Sequence[float] | None, rule: GateRule) -> dict[int, float]:
    """The chosen experts of one token with their weights."""
    scores = _softmax(logits) if rule.score == "softmax" else [1 / (1 + math.exp(-value)) for value in logits]
    choice = [score + (bias[expert] if bias else 0.0) for expert, score in enumerate(scores)]
    if rule.num_groups > 1:
        size = len(logits) // rule.num_groups
        groups = [choice[start : start + size] for start in range(0, len(logits), size)]
        strength = [max(group) if rule.group_score == "max" else sum(sorted(group)[-2:]) for group in groups]
        best = sorted(range(rule.num_groups), key=lambda group: -strength[group])[: rule.top_groups]
        choice = [value if expert // size in best else rule.masked_score for expert, value in enumerate(choice)]
    chosen = sorted(range(len(logits)), key=lambda expert: -choice[expert])[: rule.top_k]
    weights = {expert: scores[expert] for expert in chosen}
    if rule.normalize:
        total = sum(weights.values()) + rule.normalize_epsilon
        weights = {expert: weight / total for expert, weight in weights.items()}
    return {expert: weight * rule.scale for expert, weight in weights.items()}


def _softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    powers = [math.exp(value - highest) for value in logits]
    return [power / sum(powers) for power in powers]
