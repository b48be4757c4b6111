"""Llama, the dense family of DeepSeek LLM 7B and 67B. transformers: models/llama."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NoReturn

from pydantic import Field, model_validator

from model.attention.gqa import GroupedQueryAttention
from model.config import DecoderConfig, ModelConfig
from model.errors import UnsupportedModel
from model.kv_cache import CacheLayout
from model.layers import Decoder, Linear, SwiGLU
from model.logical_expert import LogicalExpert
from model.weights import TensorSource


class GroupedQueryConfig(DecoderConfig):
    """Head counts and widths of a family with grouped queries."""

    only: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({"hidden_act": ("silu",)})

    head_dim: int | None = Field(None, gt=0)

    @property
    def head_width(self) -> int:
        """Width of a head: `head_dim`, or the hidden width shared out."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @model_validator(mode="after")
    def _check_heads(self) -> "GroupedQueryConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UnsupportedModel(
                f"config.json: `num_attention_heads` is {self.num_attention_heads}; supported: "
                f"a divisor of `hidden_size` {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"config.json: `num_key_value_heads` is {self.num_kv_heads}; supported: a divisor of "
                f"`num_attention_heads` {self.num_attention_heads}"
            )
        if self.head_width % 2:
            raise UnsupportedModel(f"config.json: `head_dim` is {self.head_width}; supported: even widths, which RoPE turns in pairs")
        return self


class LlamaConfig(GroupedQueryConfig):
    """config.json of model_type `llama`."""

    architecture: ClassVar[str] = "LlamaForCausalLM"

    attention_bias: bool = False
    mlp_bias: bool = False


def load_grouped_query_attention(source: TensorSource, layer: int, config: GroupedQueryConfig, bias: bool) -> GroupedQueryAttention:
    """Reads `model.layers.L.self_attn.{q,k,v,o}_proj`."""
    name, hidden, width = f"model.layers.{layer}.self_attn", config.hidden_size, config.head_width
    num_heads, num_kv_heads = config.num_attention_heads, config.num_kv_heads
    qkv = Linear.stack(
        Linear.load(source, f"{name}.q_proj", num_heads * width, hidden, bias),
        Linear.load(source, f"{name}.k_proj", num_kv_heads * width, hidden, bias),
        Linear.load(source, f"{name}.v_proj", num_kv_heads * width, hidden, bias),
    )
    out = Linear.load(source, f"{name}.o_proj", hidden, num_heads * width, bias)
    return GroupedQueryAttention(layer, qkv, out, num_heads, num_kv_heads, width)


def grouped_query_layout(config: GroupedQueryConfig, model: Decoder) -> CacheLayout:
    """Keys and values of each KV head."""
    entry = (config.num_kv_heads, config.head_width)
    return CacheLayout(config.num_hidden_layers, (entry, entry), model.embedding.dtype)


class Llama(Decoder):
    """The whole model: a dense one has no routed experts, and its forward pass never yields."""

    config_type = LlamaConfig
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, source: TensorSource) -> None:
        self.rotary_dim = config.head_width
        super().__init__(config, source)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a token stores in each layer."""
        return grouped_query_layout(self.config, self)

    def _load_attention(self, source: TensorSource, layer: int) -> GroupedQueryAttention:
        return load_grouped_query_attention(source, layer, self.config, self.config.attention_bias)

    def _load_mlp(self, source: TensorSource, layer: int) -> SwiGLU:
        config = self.config
        return SwiGLU.load(source, f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size, config.mlp_bias)

    @staticmethod
    def load_expert(config: ModelConfig, source: TensorSource, expert: LogicalExpert) -> NoReturn:  # noqa: ARG004
        """There is none."""
        raise AssertionError(f"a dense model has no routed expert {expert}")
