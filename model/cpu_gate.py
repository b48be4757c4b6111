"""A gate on a CPU: logits, scores and the choice of experts in one call; torch takes seven, each on all tokens."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cpu_exp import exp, highest_of
from model.cpu_parts import array_at, bits, inner, job, real, take, word
from model.cpu_product import product
from model.cpu_threads import Call, run
from model.cpu_tile import NUM_TOKENS
from model.gate import Gate, Routing

_Array = npt.NDArray[Any]


@functools.cache
def prepare() -> int:
    """The job, compiled: seconds the first time on a machine and milliseconds after."""
    return job(_choose)


def choose(hidden: Tensor, gate: Gate) -> Routing:
    """K experts for each token of hidden [T, H] float32. Of a token whose logits are not all finite the weights are NaN."""
    rule, weight, bias = gate.rule, gate.weight, gate.correction_bias
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (num_tokens, size), num_experts = hidden.shape, len(weight)
    assert weight.shape[1] == size, "from here on there are only addresses"
    assert hidden.dtype == weight.dtype == torch.float32
    assert rule.top_k <= num_experts
    assert rule.top_groups <= rule.num_groups
    assert num_experts % rule.num_groups == 0
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and len(bias) == num_experts)
    ids = torch.empty((num_tokens, rule.top_k), dtype=torch.int64)
    weights = torch.empty((num_tokens, rule.top_k), dtype=torch.float32)
    places = (hidden.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), ids.data_ptr(), weights.data_ptr())
    groups = (rule.num_groups, rule.top_groups, int(rule.group_score == "max"), bits(rule.masked_score))
    scaling = (int(rule.normalize), bits(rule.normalize_epsilon), bits(rule.scale))
    sizes = (num_tokens, 0, size, num_experts, rule.top_k, int(rule.score == "softmax"))
    num_operations = num_tokens * num_experts * size
    run(Call(prepare(), (*sizes, *places, *groups, *scaling), 2, num_operations, num_tokens, NUM_TOKENS), (ids, weights))
    return Routing(ids, weights)


def _choose(block: int) -> int:
    num_tokens, part, size, num_experts, top_k = word(block, 1), word(block, 2), word(block, 3), word(block, 4), word(block, 5)
    floats, has_bias = np.empty(0, np.float32), word(block, 9) != 0
    bias = array_at(floats, word(block, 9), (num_experts if has_bias else 0,))
    ids = array_at(np.empty(0, np.int64), word(block, 10), (num_tokens, top_k))
    weights = array_at(floats, word(block, 11), (num_tokens, top_k))
    logits = np.empty((part, num_experts), np.float32)
    choice = np.empty(num_experts, np.float32)
    group_scores, best = np.empty(word(block, 12), np.float32), np.empty(word(block, 13), np.int64)
    first = take(block, part)
    while first < num_tokens:
        last = min(first + part, num_tokens)
        place = word(block, 7) + 4 * first * size
        product(floats, word(block, 8), size, num_experts, place, last - first, logits.ctypes.data, num_experts, size)
        for t in range(first, last):
            scores = logits[t - first]
            if not _are_finite(scores):
                for k in range(top_k):
                    ids[t, k] = k
                weights[t] = np.nan
                continue
            _score(scores, word(block, 6) != 0)
            for e in range(num_experts):
                choice[e] = scores[e] + bias[e] if has_bias else scores[e]
            if word(block, 12) > 1:
                _mask_groups(choice, group_scores, best, word(block, 14) != 0, np.float32(real(block, 15)))
            _take_best(choice, ids[t])
            chosen_by = scores if has_bias else choice
            _weigh(chosen_by, ids[t], word(block, 16) != 0, np.float32(real(block, 17)), np.float32(real(block, 18)), weights[t])
        first = take(block, part)
    return 1


@inner
def _are_finite(logits: _Array) -> bool:
    num_finite = 0
    for e in range(len(logits)):
        num_finite += abs(logits[e]) < np.float32(np.inf)
    return bool(num_finite == len(logits))


@inner
def _score(logits: _Array, is_softmax: bool) -> None:
    """Logits [E] become their scores."""
    if is_softmax:
        highest, total = highest_of(logits), np.float32(0)
        for e in range(len(logits)):
            logits[e] = exp(logits[e] - highest)
            total += logits[e]
        for e in range(len(logits)):
            logits[e] /= total
    else:
        for e in range(len(logits)):
            logits[e] = np.float32(1) / (np.float32(1) + exp(-logits[e]))


@inner
def _mask_groups(choice: _Array, group_scores: _Array, best: _Array, by_highest: bool, masked: float) -> None:
    """`masked` into choice [E] in all but the best groups, by their highest score or the sum of two; [G] and [best] are room."""
    num_groups = len(group_scores)
    size = len(choice) // num_groups
    for g in range(num_groups):
        highest = second = np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if choice[e] > highest:
                highest, second = choice[e], highest
            elif choice[e] > second:
                second = choice[e]
        group_scores[g] = highest if by_highest else highest + second
    _take_best(group_scores, best)
    for g in range(num_groups):
        is_best = False
        for place in best:
            is_best |= place == g
        if not is_best:
            choice[g * size : (g + 1) * size] = masked


@inner
def _take_best(scores: _Array, best: _Array) -> None:
    """The places of the highest scores, highest first."""
    num_taken = 0
    for e in range(len(scores)):
        if num_taken == len(best):
            if not scores[e] > scores[best[num_taken - 1]]:
                continue
            num_taken -= 1
        place = num_taken
        while place > 0 and scores[e] > scores[best[place - 1]]:
            best[place] = best[place - 1]
            place -= 1
        best[place] = e
        num_taken += 1


@inner
def _weigh(scores: _Array, ids: _Array, normalizes: bool, epsilon: float, scale: float, weights: _Array) -> None:
    """Weights [K] of the chosen ids [K]."""
    total = np.float32(0)
    for k in range(len(ids)):
        total += scores[ids[k]]
    for k in range(len(ids)):
        weight = scores[ids[k]] / (total + epsilon) if normalizes else scores[ids[k]]
        weights[k] = weight * scale
