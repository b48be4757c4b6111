"""What a decode step must cost: the bytes that it reads and the operations that it does, on a machine of known rates. Pure.

A step of B sequences has three parts, one after another, and each takes the longer of reading and computing:
- dense: every dense weight is read once, and multiplied once with each sequence's token;
- experts: a layer with E experts, of which a token chooses K, reads A = E (1 - (1 - K/E)^B) of them on average (each expert is left
  out by a token with probability 1 - K/E), and multiplies B K times;
- attention: every latent of every sequence's context is read once, and multiplied with each head's query and weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What it reads from memory and what it multiplies, with all threads, measured."""

    bytes_per_s: float
    operations_per_s: float  # float32, two for a multiplication with its addition

    def seconds(self, num_bytes: float, num_operations: float) -> float:
        """Reading goes on beside computing: the longer of the two."""
        return max(num_bytes / self.bytes_per_s, num_operations / self.operations_per_s)


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights are counted as the checkpoint stores them, latents as the cache does."""

    dense_bytes: float
    dense_parameters: float
    expert_bytes: float
    expert_parameters: float
    num_experts: int
    top_k: int
    num_moe_layers: int
    latent_bytes: float  # of a token, over all layers
    context_operations: float  # of a sequence's token with one token of its context, over all layers


@dataclass(frozen=True)
class StepLaw:
    """Seconds of each part of a step, and the experts that it activates in a layer."""

    dense_s: float
    experts_s: float
    attention_s: float
    activated: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return self.dense_s + self.experts_s + self.attention_s


def activated_experts(num_experts: int, top_k: int, batch: int) -> float:
    """Of a layer, on average, where every token chooses `top_k` different experts and none is liked better."""
    return num_experts * (1 - (1 - top_k / num_experts) ** batch)


def step_bytes(sizes: Sizes, batch: int, context: int) -> float:
    """That a step of `batch` sequences with `context` tokens each reads."""
    activated = activated_experts(sizes.num_experts, sizes.top_k, batch)
    return sizes.dense_bytes + sizes.num_moe_layers * activated * sizes.expert_bytes + batch * context * sizes.latent_bytes


def step_law(machine: Machine, sizes: Sizes, batch: int, context: int) -> StepLaw:
    """Of one decode step."""
    activated = activated_experts(sizes.num_experts, sizes.top_k, batch)
    layers = sizes.num_moe_layers
    return StepLaw(
        machine.seconds(sizes.dense_bytes, 2 * batch * sizes.dense_parameters),
        machine.seconds(layers * activated * sizes.expert_bytes, 2 * layers * batch * sizes.top_k * sizes.expert_parameters),
        machine.seconds(batch * context * sizes.latent_bytes, batch * context * sizes.context_operations),
        activated,
    )


def hosts_law(alone_s: float, num_moe_layers: int, delay_s: float, busiest: float) -> float:
    """Seconds of a step over metered hosts: the step on one host without delay (dense part and a hop a layer), and in every layer the
    delay for each choice that the busiest host has; others wait for nobody longer."""
    return alone_s + num_moe_layers * delay_s * busiest


@dataclass(frozen=True)
class Line:
    """y = constant + slope x."""

    constant: float
    slope: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares of the relative error, so that the largest does not outweigh all others; every y above 0."""
    weights = [1 / value**2 for value in y]
    total = math.fsum(weights)
    mean_x = math.fsum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = math.fsum(w * b for w, b in zip(weights, y, strict=True)) / total
    spread = math.fsum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    together = math.fsum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = together / spread
    return Line(mean_y - slope * mean_x, slope)
