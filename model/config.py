"""What the rest of Shoal needs to know of a checkpoint, whatever its family, and the one way a config.json is read.

Every key of a config.json is either
- a field of the family's config, used exactly;
- in `irrelevant`: it cannot change what the model answers (training, storage, transformers' own bookkeeping);
- in `only`: accepted with the listed values, refused with any other;
- unknown: accepted if it says that something is absent (null, false, empty), refused otherwise.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import CheckpointError, UnsupportedModel
from model.rope import ROPE_KEYS, RopeConfig, read_rope

# fmt: off
IRRELEVANT = frozenset({
    "model_type", "architectures", "auto_map", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version",
    "torch_dtype", "dtype", "initializer_range", "use_cache", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop",
    "pretraining_tp", "ep_size", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "return_dict_in_generate", "torchscript", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_jitter_noise",
    "router_z_loss_coef", "use_bfloat16", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "unk_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "_flash_attn_2_enabled", "max_length", "min_length", "do_sample", "temperature", "top_p",
    "top_k", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "diversity_penalty", "num_beam_groups",
    "early_stopping", "num_return_sequences", "typical_p", "unsloth_version", "unsloth_fixed",
})
# fmt: on


class ModelConfig(BaseModel):
    """A family's config.json, checked: every key either used exactly or refused by name."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0, description="The model's length in tokens; with RoPE kind `dynamic`, factor x the key.")
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts; empty for a dense model."""
        return ()

    @property
    def num_routed_experts(self) -> int:
        """Routed experts in each MoE layer (E); 0 for a dense model."""
        return 0

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts chosen for each token (K); 0 for a dense model."""
        return 0

    @property
    def moe_intermediate_size(self) -> int:
        """Inner width of a routed expert (I); 0 for a dense model."""
        return 0

    @property
    def ignored_tensor_prefixes(self) -> tuple[str, ...]:
        """Names of checkpoint tensors that no forward pass uses begin with one of these."""
        return ()


class DecoderConfig(ModelConfig):
    """What the four families share. Keys are config.json's; defaults are transformers' own."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    architecture: ClassVar[str]
    default_theta: ClassVar[float] = 10_000.0
    irrelevant: ClassVar[frozenset[str]] = frozenset()
    only: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({})

    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    rope: RopeConfig

    @classmethod
    def parse(cls, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> Self:
        """Reads a config.json and a generation_config.json (or {}). UnsupportedModel names key, value and what is supported."""
        _check_architectures(raw.get("architectures"), cls.architecture)
        _check_quantization(raw.get("quantization_config"))
        fields = {field.alias or name for name, field in cls.model_fields.items()} - {"rope", "eos_token_ids"}
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key in fields:
                values[key] = value
            elif key in cls.only:
                if value not in cls.only[key]:
                    _refuse(key, value, " or ".join(repr(allowed) for allowed in cls.only[key]))
            elif key not in IRRELEVANT | ROPE_KEYS | cls.irrelevant and key != "quantization_config" and not _absent(value):
                _refuse(key, value, f"no such key is known for model_type {raw['model_type']!r}")
        length = raw.get("max_position_embeddings")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            _refuse("max_position_embeddings", length, "a positive integer")
        rope = read_rope(raw, cls.default_theta, length)
        end = generation.get("eos_token_id")
        values |= {
            "model_type": raw["model_type"],
            "rope": rope,
            # Beyond the key's length is where `dynamic` does anything: the length it serves is the scaled one.
            "max_position_embeddings": int(length * rope.factor) if rope.kind == "dynamic" else length,
            "eos_token_ids": _token_ids("eos_token_id", raw.get("eos_token_id") if end is None else end),
            "bos_token_id": next(iter(_token_ids("bos_token_id", raw.get("bos_token_id"))), None),
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            found = "absent" if first["type"] == "missing" else repr(first["input"])
            raise UnsupportedModel(f"config.json: `{key}` is {found}: {first['msg']}") from error


Config = TypeVar("Config", bound=DecoderConfig)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. CheckpointError names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory has a config.json and safetensors files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse(key: str, value: object, supported: str) -> NoReturn:
    raise UnsupportedModel(f"config.json: `{key}` is {value!r}; supported: {supported}")


def _absent(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_architectures(names: object, architecture: str) -> None:
    if not _absent(names) and names != [architecture]:
        _refuse("architectures", names, repr([architecture]))


def _check_quantization(value: object) -> None:
    """Block-scaled FP8 is widened at load; whatever else packs weights is not read."""
    if _absent(value):
        return
    supported = "absent, or quant_method 'fp8' with fmt 'e4m3', activation_scheme 'dynamic' and a weight_block_size of two integers"
    if not isinstance(value, dict) or value.get("quant_method") != "fp8" or value.get("fmt", "e4m3") != "e4m3":
        _refuse("quantization_config", value, supported)
    block = value.get("weight_block_size")
    if value.get("activation_scheme", "dynamic") != "dynamic" or not isinstance(block, list) or len(block) != 2:
        _refuse("quantization_config", value, supported)


def _token_ids(key: str, value: object) -> tuple[int, ...]:
    """None, one id or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        _refuse(key, value, "null, a token id or a list of token ids")
    return tuple(ids)
