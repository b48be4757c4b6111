"""Tiny seeded checkpoints, written as the hub writes them, and transformers' float32 answers to them.

directory = write_tiny("v3-yarn", tmp_path)          # config.json, weights, generation_config.json, tokenizer
model = oracle("v3-yarn")                            # transformers, the same weights
expected = oracle_greedy(model, prompt_ids, 64)
assert_greedy_equal(ours, expected.token_ids, expected.margins)
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.model.tiny_tokenizer import write_byte_level
from tests.tiny_specs import TINY, VOCABULARY, TinySpec

__all__ = [
    "EOS_TOKEN_IDS",
    "TINY",
    "VOCABULARY",
    "OracleGreedy",
    "TinySpec",
    "assert_greedy_equal",
    "oracle",
    "oracle_greedy",
    "oracle_logits",
    "tiny_state",
    "write_tiny",
]

Storage = Literal["float32", "bfloat16", "float16", "float8"]
ExpertNames = Literal["hub", "fused"]
EOS_TOKEN_IDS = [1, 411]
FP8_BLOCK = 32
TIE = 1e-3


@dataclass(frozen=True)
class OracleGreedy:
    """Greedy tokens, and at each step the distance of the two best logits."""

    token_ids: list[int]
    margins: list[float]


@lru_cache(maxsize=4)
def oracle(name: str, storage: Storage = "float32") -> PreTrainedModel:
    """transformers' model in float32 with eager attention, its weights those that `storage` can hold."""
    model = _seeded(name)
    if storage != "float32":
        rounded = {key: _rounded(key, tensor, storage) for key, tensor in model.state_dict().items()}
        model.load_state_dict(rounded)
    return model


def _seeded(name: str) -> PreTrainedModel:
    spec = TINY[name]
    config = AutoConfig.for_model(**spec.config)
    config.dtype = torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(spec.seed)
    seen: set[int] = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is drawn once
            seen.add(tensor.data_ptr())
            tensor.copy_(_drawn(key, tensor.shape, generator, spec.config["tie_word_embeddings"]))
    return model.requires_grad_(False)


def _drawn(key: str, shape: torch.Size, generator: torch.Generator, is_tied: bool) -> Tensor:
    """Values of a size that lets every part of the model show in its logits."""
    values = torch.randn(shape, generator=generator)
    if key.endswith("norm.weight"):
        return 1 + 0.3 * values
    if key.endswith("bias"):
        return 0.3 * values
    if "embed_tokens" in key:
        # A large tied embedding would answer each token with itself.
        return 0.2 * values if is_tied else values
    gain = 2.0 if "gate.weight" in key or "lm_head" in key else 1.5
    return gain * values / shape[-1] ** 0.5


def oracle_greedy(model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int) -> OracleGreedy:
    """Alone, with transformers' own cache."""
    _forget_lengths(model)
    token_ids: list[int] = []
    margins: list[float] = []
    inputs, cache = torch.tensor([list(prompt_ids)]), None
    with torch.no_grad():
        for _ in range(num_tokens):
            answer = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            best = answer.logits[0, -1].topk(2)
            token_ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            inputs, cache = best.indices[:1].view(1, 1), answer.past_key_values
    return OracleGreedy(token_ids, margins)


def oracle_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of one prompt in one pass."""
    _forget_lengths(model)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def _forget_lengths(model: PreTrainedModel) -> None:
    """Dynamic RoPE remembers the longest sequence it has seen; a request alone would meet a fresh one."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)


def assert_greedy_equal(ours: Sequence[int], oracle_tokens: Sequence[int], margins: Sequence[float], tie: float = TIE) -> str | None:
    """Equal, or first different where the oracle's two best logits lie within `tie`: then says where, since all that follows differs."""
    assert len(ours) == len(oracle_tokens), f"{len(ours)} tokens, expected {len(oracle_tokens)}"
    for step, (found, expected, margin) in enumerate(zip(ours, oracle_tokens, margins, strict=True)):
        if found != expected:
            assert margin < tie, (
                f"token {step} is {found}, expected {expected} by a margin of {margin:.5f}: {list(ours)} != {list(oracle_tokens)}"
            )
            return f"tie at token {step}: {found} for {expected}, margin {margin:.2e}"
    return None


def write_tiny(
    name: str,
    directory: Path | str,
    *,
    experts: ExpertNames = "hub",
    storage: Storage = "float32",
    max_shard_size: int | None = None,
) -> Path:
    """Writes the checkpoint and a byte-level tokenizer; answers with the directory. `max_shard_size` in bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(TINY[name].config, torch_dtype=storage if storage != "float8" else "bfloat16")
    if storage == "float8":
        assert experts == "hub", "block-scaled FP8 has one tensor per expert"
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": EOS_TOKEN_IDS, "do_sample": True, "temperature": 0.7}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    save_torch_state_dict(tiny_state(name, experts, storage), directory, max_shard_size=max_shard_size or "5GB")
    return write_byte_level(directory)


def tiny_state(name: str, experts: ExpertNames = "hub", storage: Storage = "float32") -> dict[str, Tensor]:
    """The checkpoint's tensors by name, as they are stored."""
    config = TINY[name].config
    stored: dict[str, Tensor] = {}
    for key, tensor in _seeded(name).state_dict().items():
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        parts = {key: tensor} if experts == "fused" else _hub_names(key, tensor, config["model_type"])
        for part_name, part in parts.items():
            value, scale = _store(part_name, part, storage)
            stored[part_name] = value
            if scale is not None:
                stored[f"{part_name}_scale_inv"] = scale
    for layer in range(config.get("num_nextn_predict_layers", 0)):
        # Enough of a multi-token prediction layer for a reader to trip over.
        prefix = f"model.layers.{config['num_hidden_layers'] + layer}"
        stored[f"{prefix}.eh_proj.weight"] = torch.zeros(config["hidden_size"], 2 * config["hidden_size"])
        stored[f"{prefix}.input_layernorm.weight"] = torch.ones(config["hidden_size"])
    return stored


def _hub_names(key: str, tensor: Tensor, model_type: str) -> dict[str, Tensor]:
    """transformers 5 holds experts fused; the hub has a tensor each, and its own name for Mixtral's block."""
    if model_type == "mixtral":
        key = key.replace(".mlp.", ".block_sparse_moe.")
    gate, up, down = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix, _, last = key.rpartition(".")
    if last == "gate_up_proj":
        halves = [weights.chunk(2) for weights in tensor]
        return {f"{prefix}.{n}.{part}.weight": half[i].clone() for n, half in enumerate(halves) for i, part in enumerate((gate, up))}
    if last == "down_proj":
        return {f"{prefix}.{n}.{down}.weight": weights.clone() for n, weights in enumerate(tensor)}
    return {key: tensor}


def _store(key: str, tensor: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """What lies in the file: the tensor, and its factors if it is FP8. DeepSeek-V3 keeps the correction bias in float32."""
    if storage == "float32" or key.endswith("e_score_correction_bias"):
        return tensor, None
    if storage != "float8":
        return tensor.to(getattr(torch, storage)), None
    if tensor.ndim == 1 or "embed_tokens" in key or "lm_head" in key or "mlp.gate." in key or "block_sparse_moe.gate." in key:
        return tensor.to(torch.bfloat16), None
    rows, columns = (-(-width // FP8_BLOCK) for width in tensor.shape[-2:])
    factors = torch.ones(*tensor.shape[:-2], rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = tensor[..., row * FP8_BLOCK : (row + 1) * FP8_BLOCK, column * FP8_BLOCK : (column + 1) * FP8_BLOCK]
            factors[..., row, column] = block.abs().amax(dim=(-2, -1)) / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / _spread(factors, tensor.shape)).to(torch.float8_e4m3fn), factors


def _rounded(key: str, tensor: Tensor, storage: Storage) -> Tensor:
    """What a reader finds; gate and up are two tensors in the file, and blocks of FP8 do not span them."""
    if key.endswith("gate_up_proj"):
        return torch.cat([_rounded(f"{key}.half", half, storage) for half in tensor.chunk(2, dim=1)], dim=1)
    return _widen(*_store(key, tensor, storage))


def _widen(tensor: Tensor, factors: Tensor | None) -> Tensor:
    return tensor.float() if factors is None else tensor.float() * _spread(factors, tensor.shape)


def _spread(factors: Tensor, shape: torch.Size) -> Tensor:
    spread = factors.repeat_interleave(FP8_BLOCK, dim=-2).repeat_interleave(FP8_BLOCK, dim=-1)
    return spread[..., : shape[-2], : shape[-1]]
