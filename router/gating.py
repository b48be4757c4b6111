"""Gating: a token batch and a gate in, the chosen experts and their weights out. Pure; float32 whatever the model's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gate import Gate, GateRule, Routing


def route(hidden: Tensor, token_ids: Tensor, gate: Gate) -> Routing:  # noqa: ARG001  # some families route layers by token id
    """Chooses K experts for each token of hidden [T, H] with ids token_ids [T], by the rule that `GateRule` writes down."""
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        from model import cpu_gate  # brings Numba, for which a router on a GPU has no use

        return cpu_gate.choose(hidden, gate)
    return choose_by_torch(hidden, gate)


def choose_by_torch(hidden: Tensor, gate: Gate) -> Routing:
    """The same on any device and in any type; logits that are not finite may have finite weights here, not only NaN."""
    rule = gate.rule
    logits = F.linear(hidden.float(), gate.weight)
    scores = torch.softmax(logits, dim=-1) if rule.score == "softmax" else torch.sigmoid(logits)
    choice = scores if gate.correction_bias is None else scores + gate.correction_bias
    if rule.num_groups > 1:
        choice = _mask_groups(choice, rule)
    expert_ids = torch.topk(choice, rule.top_k, dim=-1, sorted=False).indices
    # Without a bias a masked expert that is chosen for want of others has its masked score for weight.
    weights = (choice if gate.correction_bias is None else scores).gather(1, expert_ids)
    if rule.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + rule.normalize_epsilon)
    return Routing(expert_ids, weights * rule.scale)


def _mask_groups(choice: Tensor, rule: GateRule) -> Tensor:
    """Choice scores [T, E] with `masked_score` in all but each token's best groups."""
    groups = choice.view(len(choice), rule.num_groups, choice.shape[1] // rule.num_groups)
    best = groups.amax(dim=-1) if rule.group_score == "max" else groups.topk(2, dim=-1).values.sum(dim=-1)
    chosen = torch.topk(best, rule.top_groups, dim=-1, sorted=False).indices
    is_masked = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
    return groups.masked_fill(is_masked.unsqueeze(-1), rule.masked_score).flatten(1)
