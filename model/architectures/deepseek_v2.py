"""DeepSeek-V2 (arXiv 2405.04434): latent attention, shared and routed experts. transformers: models/deepseek_v2."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from model.attention.mla import LatentAttention, MLADims, MLAWeights
from model.config import DecoderConfig, ModelConfig
from model.errors import UnsupportedModel
from model.experts import ExpertWeights
from model.gate import Gate, GateRule
from model.kv_cache import CacheLayout
from model.layers import Decoder, Linear, RMSNorm, RoutedExperts, SwiGLU
from model.logical_expert import LogicalExpert
from model.rope import deinterleave
from model.weights import TensorSource

# The norms inside attention keep transformers' default, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class LatentMoEConfig(DecoderConfig):
    """What the config.json of DeepSeek-V2 and V3 share."""

    q_lora_rank: int | None = Field(1536, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2)
    v_head_dim: int = Field(gt=0)
    qk_head_dim: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int | None = Field(None, ge=0)
    top_k: int = Field(gt=0, alias="num_experts_per_tok")
    expert_intermediate_size: int = Field(gt=0, alias="moe_intermediate_size")
    first_k_dense_replace: int = Field(0, ge=0)
    routed_scaling_factor: float = 1.0
    n_group: int | None = Field(None, gt=0)
    topk_group: int | None = Field(None, gt=0)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """All but the first `first_k_dense_replace`."""
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def num_routed_experts(self) -> int:
        """E."""
        return self.n_routed_experts

    @property
    def num_experts_per_tok(self) -> int:
        """K."""
        return self.top_k

    @property
    def moe_intermediate_size(self) -> int:
        """I."""
        return self.expert_intermediate_size

    @property
    def dims(self) -> MLADims:
        """Widths of the attention."""
        return MLADims(self.num_attention_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)

    def check_groups(self) -> None:
        """Groups must be of equal size, and fewer chosen than there are."""
        if self.n_group is None or self.n_routed_experts % self.n_group:
            raise UnsupportedModel(
                f"config.json: `n_group` is {self.n_group}; supported: a divisor of `n_routed_experts` {self.n_routed_experts}"
            )
        if self.topk_group is None or self.topk_group > self.n_group:
            raise UnsupportedModel(f"config.json: `topk_group` is {self.topk_group}; supported: 1 to `n_group` {self.n_group}")

    @model_validator(mode="after")
    def _check_widths(self) -> "LatentMoEConfig":
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "qk_head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "head_dim": self.qk_rope_head_dim,
        }
        for key, expected in derived.items():
            if getattr(self, key) not in (None, expected):
                raise UnsupportedModel(f"config.json: `{key}` is {getattr(self, key)}; supported: {expected}, which the other keys give")
        if self.top_k > self.n_routed_experts:
            raise UnsupportedModel(
                f"config.json: `num_experts_per_tok` is {self.top_k}; supported: at most `n_routed_experts` {self.n_routed_experts}"
            )
        return self


class DeepseekV2Config(LatentMoEConfig):
    """config.json of model_type `deepseek_v2`. `norm_topk_prob` has no effect in this family."""

    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    irrelevant: ClassVar[frozenset[str]] = frozenset({"norm_topk_prob"})
    only: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {"hidden_act": ("silu",), "scoring_func": ("softmax",), "moe_layer_freq": (1,)}
    )

    mlp_bias: bool = False
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"

    @model_validator(mode="after")
    def _check_groups(self) -> "DeepseekV2Config":
        if self.topk_method == "group_limited_greedy":
            self.check_groups()
        return self

    @property
    def gate_rule(self) -> GateRule:
        """Softmax; a group's score is its best; chosen scores times the scaling factor."""
        if self.topk_method == "greedy":
            return GateRule(top_k=self.top_k, score="softmax", scale=self.routed_scaling_factor)
        return GateRule(
            top_k=self.top_k,
            score="softmax",
            num_groups=self.n_group or 1,
            top_groups=self.topk_group or 1,
            group_score="max",
            masked_score=0.0,
            scale=self.routed_scaling_factor,
        )


def load_latent_attention(source: TensorSource, layer: int, config: LatentMoEConfig, interleaved: bool) -> LatentAttention:
    """Reads `model.layers.L.self_attn.*`; `interleaved`: RoPE pairs neighbouring rows in the checkpoint."""
    name, hidden, dims, bias = f"model.layers.{layer}.self_attn", config.hidden_size, config.dims, config.attention_bias
    query_rows = dims.num_heads * dims.query
    if config.q_lora_rank is None:
        query_down = Linear(_query_rows(source.take_matrix(f"{name}.q_proj.weight", (query_rows, hidden)), dims, interleaved))
        query_norm = query_up = None
    else:
        rank = config.q_lora_rank
        query_down = Linear.load(source, f"{name}.q_a_proj", rank, hidden, bias)
        query_norm = RMSNorm.load(source, f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS)
        query_up = Linear(_query_rows(source.take_matrix(f"{name}.q_b_proj.weight", (query_rows, rank)), dims, interleaved))
    latent_down = Linear.load(source, f"{name}.kv_a_proj_with_mqa", dims.latent, hidden, bias)
    if interleaved:
        latent_down = Linear(
            _latent_rows(latent_down.weight, dims),
            None if latent_down.bias is None else _latent_rows(latent_down.bias.unsqueeze(-1), dims).squeeze(-1),
        )
    latent_norm = RMSNorm.load(source, f"{name}.kv_a_layernorm", dims.kv_lora_rank, LATENT_NORM_EPS)
    up = Linear(source.take_matrix(f"{name}.kv_b_proj.weight", (dims.num_heads * (dims.nope + dims.value), dims.kv_lora_rank)))
    key_up, value_up = torch.split(up.weight.view(dims.num_heads, -1, dims.kv_lora_rank), [dims.nope, dims.value], dim=1)
    weights = MLAWeights(
        Linear.stack(query_down, latent_down),
        query_norm,
        query_up,
        latent_norm,
        up,
        # A CPU's products read rows; elsewhere a view will do.
        key_up.transpose(1, 2).contiguous() if key_up.device.type == "cpu" else key_up.transpose(1, 2),
        value_up,
        Linear.load(source, f"{name}.o_proj", hidden, dims.num_heads * dims.value, bias),
    )
    return LatentAttention(layer, weights, dims, dims.query**-0.5 * config.rope.softmax_scale_factor)


def _query_rows(weight: Tensor, dims: MLADims, interleaved: bool) -> Tensor:
    """Rows [heads * (nope + rope), in] with each head's rope rows de-interleaved."""
    if not interleaved:
        return weight
    nope, rope = torch.split(weight.view(dims.num_heads, dims.query, -1), [dims.nope, dims.rope], dim=1)
    return torch.cat((nope, deinterleave(rope)), dim=1).flatten(0, 1)


def _latent_rows(weight: Tensor, dims: MLADims) -> Tensor:
    """Rows [kv_lora_rank + rope, in] with the rope rows de-interleaved."""
    compressed, rope = torch.split(weight, [dims.kv_lora_rank, dims.rope])
    return torch.cat((compressed, deinterleave(rope)))


def load_latent_expert(config: ModelConfig, source: TensorSource, expert: LogicalExpert) -> ExpertWeights:
    """One routed expert, out of `mlp.experts.N.*_proj` or the fused `mlp.experts.gate_up_proj` and `.down_proj`."""
    inner, hidden, num_experts = config.moe_intermediate_size, config.hidden_size, config.num_routed_experts
    name = f"model.layers.{expert.layer}.mlp.experts"
    if source.has(f"{name}.gate_up_proj"):
        return ExpertWeights(
            source.take_part(f"{name}.gate_up_proj", expert.expert, num_experts, (2 * inner, hidden)),
            source.take_part(f"{name}.down_proj", expert.expert, num_experts, (hidden, inner)),
        )
    name = f"{name}.{expert.expert}"
    gate_up = torch.cat([source.take(f"{name}.{part}.weight", (inner, hidden)) for part in ("gate_proj", "up_proj")])
    return ExpertWeights(gate_up, source.take(f"{name}.down_proj.weight", (hidden, inner)))


class LatentMoE(Decoder):
    """The dense part of DeepSeek-V2 and V3: the same but for the gate and RoPE's layout."""

    config: LatentMoEConfig
    interleaved = True
    mlp_bias = False

    def __init__(self, config: LatentMoEConfig, source: TensorSource) -> None:
        self.rotary_dim = config.qk_rope_head_dim
        super().__init__(config, source)

    @property
    def cache_layout(self) -> CacheLayout:
        """The latent alone."""
        return CacheLayout(self.config.num_hidden_layers, ((self.config.dims.latent,),), self.embedding.dtype)

    def _load_attention(self, source: TensorSource, layer: int) -> LatentAttention:
        return load_latent_attention(source, layer, self.config, self.interleaved)

    def _load_mlp(self, source: TensorSource, layer: int) -> SwiGLU | RoutedExperts:
        config, name = self.config, f"model.layers.{layer}.mlp"
        if layer < config.first_k_dense_replace:
            return SwiGLU.load(source, name, config.hidden_size, config.intermediate_size, self.mlp_bias)
        shared = None
        if config.n_shared_experts:
            inner = config.n_shared_experts * config.expert_intermediate_size
            shared = SwiGLU.load(source, f"{name}.shared_experts", config.hidden_size, inner, self.mlp_bias)
        return RoutedExperts(self._load_gate(source, name), shared)

    def _load_gate(self, source: TensorSource, name: str) -> Gate:
        raise NotImplementedError

    @staticmethod
    def load_expert(config: ModelConfig, source: TensorSource, expert: LogicalExpert) -> ExpertWeights:
        """One routed expert. CheckpointError names a tensor that is missing or misshapen."""
        return load_latent_expert(config, source, expert)


class DeepseekV2(LatentMoE):
    """The dense part."""

    config_type = DeepseekV2Config
    config: DeepseekV2Config

    def __init__(self, config: DeepseekV2Config, source: TensorSource) -> None:
        self.mlp_bias = config.mlp_bias
        super().__init__(config, source)

    def _load_gate(self, source: TensorSource, name: str) -> Gate:
        weight = source.take(f"{name}.gate.weight", (self.config.n_routed_experts, self.config.hidden_size), torch.float32)
        return Gate(self.config.gate_rule, weight)
