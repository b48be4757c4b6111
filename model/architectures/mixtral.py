"""Mixtral (Jiang et al. 2024): grouped-query attention, an optional sliding window, routed experts in every layer.

Its checkpoints come in two namings: the hub's (`block_sparse_moe`, w1 = gate, w3 = up, w2 = down, a tensor per expert) and
that of transformers 5 (`mlp`, fused).
"""

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from model.architectures.llama import GroupedQueryConfig, grouped_query_layout, load_grouped_query_attention
from model.attention.gqa import GroupedQueryAttention
from model.config import ModelConfig
from model.errors import UnsupportedModel
from model.experts import ExpertWeights
from model.gate import Gate, GateRule
from model.kv_cache import CacheLayout
from model.layers import Decoder, RoutedExperts
from model.logical_expert import LogicalExpert
from model.weights import TensorSource


class MixtralConfig(GroupedQueryConfig):
    """config.json of model_type `mixtral`."""

    architecture: ClassVar[str] = "MixtralForCausalLM"
    default_theta: ClassVar[float] = 1_000_000.0

    num_key_value_heads: int | None = Field(8, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    sliding_window: int | None = Field(None, gt=0)
    num_local_experts: int = Field(8, gt=0)
    top_k: int = Field(2, gt=0, alias="num_experts_per_tok")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(self.num_hidden_layers))

    @property
    def num_routed_experts(self) -> int:
        """E."""
        return self.num_local_experts

    @property
    def num_experts_per_tok(self) -> int:
        """K."""
        return self.top_k

    @property
    def moe_intermediate_size(self) -> int:
        """I."""
        return self.intermediate_size

    @model_validator(mode="after")
    def _check_experts(self) -> "MixtralConfig":
        if self.top_k > self.num_local_experts:
            raise UnsupportedModel(
                f"config.json: `num_experts_per_tok` is {self.top_k}; supported: at most `num_local_experts` {self.num_local_experts}"
            )
        return self


class Mixtral(Decoder):
    """The dense part."""

    config_type = MixtralConfig
    config: MixtralConfig

    def __init__(self, config: MixtralConfig, source: TensorSource) -> None:
        self.rotary_dim = config.head_width
        self.sliding_window = config.sliding_window
        super().__init__(config, source)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a token stores in each layer."""
        return grouped_query_layout(self.config, self)

    def _load_attention(self, source: TensorSource, layer: int) -> GroupedQueryAttention:
        return load_grouped_query_attention(source, layer, self.config, bias=False)

    def _load_mlp(self, source: TensorSource, layer: int) -> RoutedExperts:
        hub, fused = f"model.layers.{layer}.block_sparse_moe.gate.weight", f"model.layers.{layer}.mlp.gate.weight"
        name = fused if source.has(fused) else hub
        rule = GateRule(top_k=self.config.top_k, score="softmax", normalize=True)
        return RoutedExperts(Gate(rule, source.take(name, (self.config.num_local_experts, self.config.hidden_size), torch.float32)))

    @staticmethod
    def load_expert(config: ModelConfig, source: TensorSource, expert: LogicalExpert) -> ExpertWeights:
        """One routed expert. CheckpointError names a tensor that is missing or misshapen."""
        inner, hidden, num_experts = config.moe_intermediate_size, config.hidden_size, config.num_routed_experts
        layer = f"model.layers.{expert.layer}"
        for name in (f"{layer}.mlp.experts", f"{layer}.block_sparse_moe.experts"):
            if source.has(f"{name}.gate_up_proj"):
                return ExpertWeights(
                    source.take_part(f"{name}.gate_up_proj", expert.expert, num_experts, (2 * inner, hidden)),
                    source.take_part(f"{name}.down_proj", expert.expert, num_experts, (hidden, inner)),
                )
        name = f"{layer}.block_sparse_moe.experts.{expert.expert}"
        gate_up = torch.cat([source.take(f"{name}.{part}.weight", (inner, hidden)) for part in ("w1", "w3")])
        return ExpertWeights(gate_up, source.take(f"{name}.w2.weight", (hidden, inner)))
