"""Seeded models of any size in memory, shaped as the benchmark's checkpoint: no file is written or read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.architectures import build, load_expert
from model.architectures.deepseek_v2 import DeepseekV2Config
from model.causal_lm import CausalLM
from model.experts import ExpertSlots
from model.loading import logical_experts
from model.logical_expert import LogicalExpert
from model.weights import ShapeSource, TensorSource
from tests.benchmarks.benchmark_model import CONFIG
from tests.benchmarks.growth.laws import Sizes

STORED = torch.bfloat16
DENSE = torch.float32  # what a router on a CPU computes in; matrices stay as they are stored
LENGTH = 16384  # tokens: beyond any context here
# A model of which nothing is left but its calls: as many layers, experts and choices, and hardly any numbers.
HOLLOW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 512,
}


def model_config(layers: int = 12, experts: int = 64, *, is_hollow: bool = False, vocabulary: int | None = None) -> DeepseekV2Config:
    """The benchmark's, but for these; top-6, or top-2 of fewer than 16 experts."""
    changes: dict[str, Any] = {"num_hidden_layers": layers, "n_routed_experts": experts, "max_position_embeddings": LENGTH}
    changes["num_experts_per_tok"] = 6 if experts >= 16 else 2
    if is_hollow:
        changes |= HOLLOW
    if vocabulary:
        changes["vocab_size"] = vocabulary
    return DeepseekV2Config.parse(CONFIG | changes, {})


class PoolSource:
    """Every tensor is memory of its own, filled from one pool of random numbers: what a step costs is its memory, not its values."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype = dtype
        self._pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).to(STORED)
        self._at = 0

    def fill(self, tensor: Tensor) -> None:
        """With numbers from a normal distribution."""
        flat = tensor.view(-1)
        done = 0
        while done < len(flat):
            part = self._pool[self._at : self._at + len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            self._at = (self._at + len(part)) % len(self._pool)
        self._at = (self._at + 7919) % len(self._pool)  # a prime: no two tensors of a model begin alike

    def has(self, name: str) -> bool:
        """As the hub's checkpoints have them."""
        return not name.endswith(("gate_up_proj", "bias"))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Scaled as the benchmark checkpoint's tensors are: by fan-in, norms of 1, embeddings large."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype or self._dtype)
        tensor = torch.empty(shape, dtype=STORED)
        self.fill(tensor)
        if "embed_tokens" not in name:
            tensor *= shape[-1] ** -0.5
        return tensor.to(dtype or self._dtype)

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """As it is stored, which is what a checkpoint on a CPU gives."""
        return self.take(name, shape, STORED)

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:
        """As if it were a tensor of its own."""
        return self.take(name, shape)


class _Counting:
    """Passes on, and counts the numbers that a step reads: all but the input embedding, of which it reads a few rows."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.num_parameters = 0

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if "embed_tokens" not in name:
            self.num_parameters += torch.Size(shape).numel()
        return self._source.take(name, shape, dtype)

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self.take(name, shape)

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:
        self.num_parameters += torch.Size(shape).numel()
        return self._source.take_part(name, index, num_parts, shape)


def sizes_of(config: DeepseekV2Config, stored: torch.dtype = STORED) -> Sizes:
    """By building the model of shapes alone."""
    dense, expert = _Counting(ShapeSource("meta", DENSE)), _Counting(ShapeSource("meta", stored))
    model = build(config, dense)
    load_expert(config, expert, LogicalExpert(config.moe_layers[0], 0))
    dims, layout = config.dims, model.cache_layout
    return Sizes(
        dense_bytes=dense.num_parameters * stored.itemsize,
        dense_parameters=dense.num_parameters,
        expert_bytes=expert.num_parameters * stored.itemsize,
        expert_parameters=expert.num_parameters,
        num_experts=config.num_routed_experts,
        top_k=config.num_experts_per_tok,
        num_moe_layers=len(config.moe_layers),
        latent_bytes=layout.bytes_per_token,
        context_operations=2 * config.num_hidden_layers * dims.num_heads * (dims.latent + dims.kv_lora_rank),
    )


@dataclass(frozen=True)
class Built:
    """The dense part, and the experts where they are held here."""

    config: DeepseekV2Config
    model: CausalLM
    slots: ExpertSlots
    sizes: Sizes


def build_model(config: DeepseekV2Config, num_threads: int, *, has_experts: bool = True) -> Built:
    """As a router and a host on a CPU would have it from a bfloat16 checkpoint."""
    experts = PoolSource(STORED, seed=1)
    held = ((expert, load_expert(config, experts, expert)) for expert in logical_experts(config)) if has_experts else ()
    return Built(config, build(config, PoolSource(DENSE)), ExpertSlots(held, num_threads), sizes_of(config))
