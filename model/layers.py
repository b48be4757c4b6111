"""The layers that every family is made of: linear maps, SwiGLU, norms, and the decoder that strings them together."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionPlan, plan_attention
from model.batch import Batch, Combine, Dispatch, ForwardPass
from model.config import DecoderConfig
from model.gate import Gate
from model.kv_cache import CacheLayout, PagedCache
from model.rope import Rotary, Rotation
from model.weights import STORED_DTYPES, TensorSource

if TYPE_CHECKING:
    from model.recorded_decode import RecordedDecode


class Linear:
    """y = x W^T + b: weight [out, in], bias [out] or None.

    On a CPU the weight may be of a narrower type than a float32 x: `model.cpu_product` widens it exactly, while it reads it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._product: Callable[[Tensor, Tensor], Tensor] | None = None
        if weight.device.type == "cpu" and weight.dtype in STORED_DTYPES:
            from model import cpu_product  # brings Numba, for which a router on a GPU has no use

            cpu_product.prepare(weight.dtype)
            self.weight = cpu_product.aligned(weight)
            self._product = cpu_product.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[*, out] of x [*, in]."""
        if self._product is None or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        y = self._product(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)

    @classmethod
    def load(cls, source: TensorSource, name: str, num_out: int, num_in: int, bias: bool = False) -> Self:
        """Reads `name`.weight, and `name`.bias if the config says so."""
        weight = source.take_matrix(f"{name}.weight", (num_out, num_in))
        return cls(weight, source.take(f"{name}.bias", (num_out,)) if bias else None)

    @classmethod
    def stack(cls, *linears: "Linear") -> Self:
        """Several maps of the same input as one, outputs side by side: one matrix product instead of many."""
        weight = torch.cat([linear.weight for linear in linears])
        if all(linear.bias is None for linear in linears):
            return cls(weight)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        dtype = biases[0].dtype
        zeros = (weight.new_zeros(len(linear.weight), dtype=dtype) for linear in linears)
        whole = [zero if linear.bias is None else linear.bias for linear, zero in zip(linears, zeros, strict=True)]
        return cls(weight, torch.cat(whole))


@dataclass(frozen=True)
class RMSNorm:
    """Zhang & Sennrich 2019: x / rms(x) * weight over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """In x's dtype, the mean in float32."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            from model import cpu_norm  # brings Numba, for which a router on a GPU has no use

            return cpu_norm.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    @classmethod
    def load(cls, source: TensorSource, name: str, width: int, eps: float) -> Self:
        """Reads `name`.weight."""
        weight = source.take(f"{name}.weight", (width,))
        if weight.device.type == "cpu":
            from model import cpu_norm

            cpu_norm.prepare()
        return cls(weight.contiguous(), eps)


@dataclass(frozen=True)
class SwiGLU:
    """Shazeer 2020: down(silu(gate x) * up x); gate_up holds gate's rows, then up's."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[*, H] of x [*, H]."""
        gate_up = self.gate_up(x)
        if gate_up.device.type == "cpu" and gate_up.dtype == torch.float32:
            from model import cpu_silu  # brings Numba, for which a router on a GPU has no use

            return self.down(cpu_silu.silu_times(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    @classmethod
    def load(cls, source: TensorSource, name: str, hidden: int, inner: int, bias: bool = False) -> Self:
        """Reads `name`.gate_proj, .up_proj and .down_proj."""
        gate = Linear.load(source, f"{name}.gate_proj", inner, hidden, bias)
        up = Linear.load(source, f"{name}.up_proj", inner, hidden, bias)
        return cls(Linear.stack(gate, up), Linear.load(source, f"{name}.down_proj", hidden, inner, bias))


class Attention(Protocol):
    """One layer's attention over the paged cache."""

    def __call__(self, hidden: Tensor, rotation: Rotation, plan: AttentionPlan, cache: PagedCache) -> Tensor:
        """Writes the keys and values of hidden [T, H] into the cache, attends, returns [T, H]."""
        ...


@dataclass(frozen=True)
class RoutedExperts:
    """An MoE layer without its experts: the gate, and the shared experts that run while the routed ones are away."""

    gate: Gate
    shared: SwiGLU | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """x + attention(norm x), then x + mlp(norm x)."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: SwiGLU | RoutedExperts


class Decoder(ABC):
    """The dense part of a pre-norm decoder. A family builds the layers and names its tensors; the forward pass is one.

    Its tensors: `model.embed_tokens`, `model.layers.L.*`, `model.norm`, `lm_head`.
    """

    # Width of what RoPE turns, and the window of attention in tokens (None: all of the context).
    rotary_dim: int
    sliding_window: int | None = None

    def __init__(self, config: DecoderConfig, source: TensorSource) -> None:
        self.config = config
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embedding = source.take("model.embed_tokens.weight", vocabulary)
        self.layers = [self._build_layer(source, layer) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm.load(source, "model.norm", config.hidden_size, config.rms_norm_eps)
        # As transformers does: a head that the checkpoint has is used, whatever the config says of tying.
        tied = config.tie_word_embeddings and not source.has("lm_head.weight")
        head = source.take_matrix("model.embed_tokens.weight" if tied else "lm_head.weight", vocabulary)
        self.head = Linear(self.embedding if tied and head.dtype == self.embedding.dtype else head)
        self.rotary = Rotary(config.rope, self.rotary_dim, self.embedding.device)
        self._recorded: RecordedDecode | None = None
        if self.embedding.device.type == "cpu" and self.embedding.dtype == torch.float32:
            # These bring Numba, for which a router on a GPU has no use.
            from model import cpu_add, cpu_gate, cpu_recording, cpu_silu, recorded_decode

            for code in (cpu_add, cpu_gate, cpu_recording, cpu_silu):
                code.prepare()
            self._recorded = recorded_decode.RecordedDecode(self.layers, self.sliding_window)

    @property
    @abstractmethod
    def cache_layout(self) -> CacheLayout:
        """What a token stores in each layer."""

    @abstractmethod
    def _load_attention(self, source: TensorSource, layer: int) -> Attention: ...

    @abstractmethod
    def _load_mlp(self, source: TensorSource, layer: int) -> SwiGLU | RoutedExperts: ...

    def _build_layer(self, source: TensorSource, layer: int) -> DecoderLayer:
        name, hidden, eps = f"model.layers.{layer}", self.config.hidden_size, self.config.rms_norm_eps
        return DecoderLayer(
            RMSNorm.load(source, f"{name}.input_layernorm", hidden, eps),
            self._load_attention(source, layer),
            RMSNorm.load(source, f"{name}.post_attention_layernorm", hidden, eps),
            self._load_mlp(source, layer),
        )

    def gate(self, layer: int) -> Gate:
        """The gate of a layer in `config.moe_layers`."""
        mlp = self.layers[layer].mlp
        assert isinstance(mlp, RoutedExperts), f"layer {layer} has no routed experts"
        return mlp.gate

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings [T, H]."""
        return F.embedding(token_ids, self.embedding)

    def forward(self, batch: Batch, cache: PagedCache) -> ForwardPass:
        """Writes the batch's tokens into the cache, attends to each sequence's pages, returns logits [R, V] float32.

        After the last attention only the R rows go on: of a prompt nobody asks for what the last experts would make of the others.
        """
        hidden, token_ids = self.embed(batch.token_ids), batch.token_ids
        plan = plan_attention(batch, cache.page_size, self.sliding_window)
        rotation = self.rotary(batch.positions, batch.rope_lengths, hidden.dtype)
        recorded = None if self._recorded is None else self._recorded.forward(hidden, batch, rotation, plan, cache)
        if recorded is not None:
            hidden = yield from recorded
            return self.head(self.norm(hidden)).float()
        for index, layer in enumerate(self.layers):
            hidden = hidden + layer.attention(layer.attention_norm(hidden), rotation, plan, cache)
            if layer is self.layers[-1]:
                hidden, token_ids = hidden[batch.logit_rows], token_ids[batch.logit_rows]
                if not len(hidden):  # the prompts go on in later steps
                    break
            normed = layer.mlp_norm(hidden)
            if isinstance(layer.mlp, SwiGLU):
                hidden = hidden + layer.mlp(normed)
                continue
            handle = yield Dispatch(index, normed, token_ids)
            if layer.mlp.shared is not None:
                hidden = hidden + layer.mlp.shared(normed)
            routed = yield Combine(handle)
            assert isinstance(routed, Tensor), "the driver answers Combine with the experts' sum"
            hidden = hidden + routed
        return self.head(self.norm(hidden)).float()
