"""Rotary position embeddings: the kinds default, linear, dynamic, llama3 and yarn, as transformers computes them.

Sources: Su et al. 2021 (RoPE); kaiokendev (linear); bloc97, emozilla (dynamic NTK); Meta's Llama 3.1 reference code;
Peng et al. 2023 (YaRN), with DeepSeek's mscale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from model.errors import UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
# Keys of a config.json that this file reads.
ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"})
_REQUIRED: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
_OPTIONAL: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "dynamic": frozenset(),
    "llama3": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset(
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
}


class RopeConfig(BaseModel):
    """`max_position_embeddings` is config.json's own; the `original` one is the length before YaRN or Llama 3 stretched it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: RopeKind
    theta: float = Field(gt=1, allow_inf_nan=False)
    max_position_embeddings: int = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    factor: float = Field(1.0, ge=1, allow_inf_nan=False)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    attention_factor: float | None = Field(None, ge=0)
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def softmax_scale_factor(self) -> float:
        """What DeepSeek's attention multiplies its softmax scale by; other families do not."""
        return _yarn_mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(self.factor, self.mscale_all_dim)
        return _yarn_mscale(self.factor, 1.0)


def read_rope(raw: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """The RoPE of a config.json: `rope_parameters`, or the older `rope_scaling` with `rope_theta`; "rope_type" or "type".

    UnsupportedModel names the key, its value and what is supported.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        _refuse(key, given, "an object with `rope_type`")
    given = dict(given)
    old_kind = given.pop("type", None)
    kind = given.pop("rope_type", None) or old_kind or "default"
    if kind not in get_args(RopeKind):
        _refuse(f"{key}.rope_type", kind, ", ".join(get_args(RopeKind)))
    theta = given.pop("rope_theta", raw.get("rope_theta", default_theta))
    partial = given.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        _refuse("partial_rotary_factor", partial, "1.0")
    for name in _REQUIRED[kind]:
        if given.get(name) is None:
            _refuse(f"{key}.{name}", given.get(name), f"a number, which rope_type {kind!r} needs")
    for name, value in list(given.items()):
        if name not in _REQUIRED[kind] | _OPTIONAL[kind]:
            if value is not None and value is not False:
                _refuse(f"{key}.{name}", value, f"no such key with rope_type {kind!r}")
            del given[name]
        elif value is None:
            del given[name]
    if kind in ("llama3", "yarn"):
        # As in transformers: the key beside the object wins over the one in it.
        outer = raw.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = outer or given.get("original_max_position_embeddings", max_position_embeddings)
    else:
        given["original_max_position_embeddings"] = max_position_embeddings
    try:
        return RopeConfig.model_validate({"kind": kind, "theta": theta, "max_position_embeddings": max_position_embeddings, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UnsupportedModel(f"config.json: `{key}.{name}` is {first['input']!r}: {first['msg']}") from error


def _refuse(key: str, value: object, supported: str) -> NoReturn:
    raise UnsupportedModel(f"config.json: `{key}` is {value!r}; supported: {supported}")


@dataclass(frozen=True)
class Rotation:
    """The step's rotation, once for all layers: cos and sin [T, D / 2], already scaled."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates x [T, heads, D]: dimension i pairs with i + D / 2."""
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rotary:
    """Angles of positions for one head width D."""

    def __init__(self, config: RopeConfig, dim: int, device: torch.device) -> None:
        self.config = config
        self.dim = dim
        self.inverse_frequencies = inverse_frequencies(config, dim).to(device)

    def __call__(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> Rotation:
        """Positions [T]; lengths [T] are the sequence lengths that kind `dynamic` scales by, and no other kind reads."""
        frequencies = self.inverse_frequencies
        if self.config.kind == "dynamic":
            frequencies = _dynamic_frequencies(self.config, self.dim, lengths)
        angles = positions.unsqueeze(-1).float() * frequencies
        scaling = self.config.attention_scaling
        return Rotation((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))


def deinterleave(weight: Tensor) -> Tensor:
    """Reorders rows [..., D, *] of pairs (0, 1), (2, 3), ... so that row i pairs with i + D / 2, as `Rotation` wants it.

    A dot product of query and key does not feel the reordering, as long as both have it.
    """
    return torch.cat((weight[..., 0::2, :], weight[..., 1::2, :]), dim=-2)


def inverse_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """[D / 2] float32; for kind `dynamic`, those of sequences up to the model's own length."""
    plain = 1.0 / (config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    match config.kind:
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3_frequencies(config, plain)
        case "yarn":
            return _yarn_frequencies(config, dim)
        case _:
            return plain


def _dynamic_frequencies(config: RopeConfig, dim: int, lengths: Tensor) -> Tensor:
    """[T, D / 2]: the base grows with each token's sequence length, once past the model's own."""
    limit = config.max_position_embeddings
    stretch = config.factor * lengths.clamp(min=limit) / limit - (config.factor - 1)
    base = config.theta * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
    return 1.0 / (base.float().unsqueeze(-1) ** exponents)


def _llama3_frequencies(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are stretched by factor, short ones kept, those between blended."""
    length, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / plain
    smooth = (length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * plain / config.factor + smooth * plain
    stretched = torch.where(wavelengths > length / low, plain / config.factor, plain)
    between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(between, blended, stretched)


def _yarn_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """NTK by parts: dimensions that turn often within the original length are kept, those that turn seldom interpolated."""

    def dimension_of(rotations: float) -> float:
        length = config.original_max_position_embeddings
        return (dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast or 32), dimension_of(config.beta_slow or 1)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = config.theta ** (torch.arange(0, dim, 2).float() / dim)
    return 1.0 / (config.factor * frequencies) * ramp + 1.0 / frequencies * (1 - ramp)


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0
