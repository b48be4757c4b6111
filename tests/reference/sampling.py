"""Sampling the slow way: one row at a time, Python's own integers, transformers' logits processors where it has them."""

from fractions import Fraction

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from router.request import SamplingParams

_MASK = (1 << 64) - 1


def splitmix64(seed: int, position: int) -> float:
    """u(seed, position), in Python's unbounded integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return x ^ (x >> 31)

    state = (mix(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    return float(Fraction(mix(state) >> 11, 1 << 53))


def adjusted_row(
    logits: torch.Tensor, params: SamplingParams, prompt: tuple[int, ...], generated: tuple[int, ...], end: tuple[int, ...]
) -> torch.Tensor:
    """Logits [V] after bias, min_tokens and penalties."""
    row = logits.clone()
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if len(generated) < params.min_tokens:
        for token in end:
            row[token] = -torch.inf
    if params.repetition_penalty != 1.0:
        context = torch.tensor([prompt + generated])
        row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(context, row[None])[0]
    for token in set(generated):
        row[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return row


def probabilities(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [V] that is drawn from, in float64; one-hot for temperature 0."""
    if params.temperature == 0.0:
        return torch.nn.functional.one_hot(row.argmax(), len(row)).double()
    scores = row.double()[None]
    scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0].softmax(dim=-1)


def bracket(distribution: torch.Tensor, token: int) -> tuple[float, float]:
    """The interval of u that gives the token."""
    cumulative = distribution.cumsum(dim=0)
    return float(cumulative[token] - distribution[token]), float(cumulative[token])
