"""DeepSeek-V3 (arXiv 2412.19437): V2's layers, with a sigmoid gate steered by a correction bias. transformers: models/deepseek_v3."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from model.architectures.deepseek_v2 import LatentMoE, LatentMoEConfig
from model.errors import UnsupportedModel
from model.gate import Gate, GateRule
from model.weights import TensorSource


class DeepseekV3Config(LatentMoEConfig):
    """config.json of model_type `deepseek_v3`."""

    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    only: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {"hidden_act": ("silu",), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
    )

    n_shared_experts: int | None = Field(1, ge=0)
    first_k_dense_replace: int = Field(3, ge=0)
    routed_scaling_factor: float = 2.5
    n_group: int | None = Field(8, gt=0)
    topk_group: int | None = Field(4, gt=0)
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    num_nextn_predict_layers: int = Field(0, ge=0)

    @property
    def ignored_tensor_prefixes(self) -> tuple[str, ...]:
        """The multi-token prediction layers, which lie behind the last layer."""
        end = self.num_hidden_layers
        return tuple(f"model.layers.{layer}." for layer in range(end, end + self.num_nextn_predict_layers))

    @model_validator(mode="after")
    def _check_groups(self) -> "DeepseekV3Config":
        self.check_groups()
        group_size = self.n_routed_experts // (self.n_group or 1)
        if group_size < 2:
            raise UnsupportedModel(f"config.json: `n_group` is {self.n_group}; supported: groups of 2 experts or more")
        if self.top_k > group_size * (self.topk_group or 1):
            raise UnsupportedModel(
                f"config.json: `topk_group` is {self.topk_group}; supported: enough groups of {group_size} for "
                f"`num_experts_per_tok` {self.top_k}"
            )
        return self

    @property
    def gate_rule(self) -> GateRule:
        """Sigmoid; biased choice among the groups whose two best add up highest; unbiased, normalised, scaled weights."""
        return GateRule(
            top_k=self.top_k,
            score="sigmoid",
            num_groups=self.n_group or 1,
            top_groups=self.topk_group or 1,
            group_score="top2_sum",
            masked_score=float("-inf"),
            normalize=self.norm_topk_prob,
            normalize_epsilon=1e-20,
            scale=self.routed_scaling_factor,
        )


class DeepseekV3(LatentMoE):
    """The dense part."""

    config_type = DeepseekV3Config
    config: DeepseekV3Config

    def __init__(self, config: DeepseekV3Config, source: TensorSource) -> None:
        self.interleaved = config.rope_interleave
        super().__init__(config, source)

    def _load_gate(self, source: TensorSource, name: str) -> Gate:
        num_experts = self.config.n_routed_experts
        weight = source.take(f"{name}.gate.weight", (num_experts, self.config.hidden_size), torch.float32)
        bias = source.take(f"{name}.gate.e_score_correction_bias", (num_experts,), torch.float32)
        return Gate(self.config.gate_rule, weight, bias)
