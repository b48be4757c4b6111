"""Tiny seeded checkpoints, written as the hub writes them, and transformers' float32 answers to them.

directory = write_tiny("v3-yarn", tmp_path)          # config.json, weights, generation_config.json, tokenizer
model = oracle("v3-yarn")                            # transformers, the same weights
expected = oracle_greedy(model, prompt_ids, 64)
assert_greedy_equal(ours, expected.token_ids, expected.margins)
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.model.tiny_tokenizer import write_byte_level

Storage = Literal["float32", "bfloat16", "float16", "float8"]
ExpertNames = Literal["hub", "fused"]
VOCABULARY = 416
EOS_TOKEN_IDS = [1, 411]
FP8_BLOCK = 32
TIE = 1e-3


@dataclass(frozen=True)
class TinySpec:
    """`config` is the checkpoint's config.json; `covers` says which features it is here for."""

    covers: str
    config: dict[str, Any] = field(hash=False)
    seed: int = 0

    @property
    def is_dense(self) -> bool:
        return self.config["model_type"] == "llama"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def _v2(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **_COMMON,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 1,
        "rope_theta": 10000,
        "rope_scaling": None,
        **changes,
    }


def _v3(**changes: Any) -> dict[str, Any]:
    config = _v2(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        q_lora_rank=24,
        n_routed_experts=32,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        ep_size=1,
        num_nextn_predict_layers=1,
    )
    return config | changes


def _mixtral(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_COMMON,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        **changes,
    }


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_COMMON,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rope_theta": 10000.0,
        **changes,
    }


TINY: dict[str, TinySpec] = {
    "v2-lite": TinySpec(
        "q_lora_rank null, greedy, first dense layer, YaRN with mscale in the old form",
        _v2(rope_scaling={"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707, **_YARN}),
        seed=1,
    ),
    "v2-groups": TinySpec(
        "q_lora_rank, group_limited_greedy, scaling, attention biases, YaRN in the new form with two mscales",
        _v2(
            q_lora_rank=24,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
            attention_bias=True,
            rope_scaling=None,
            rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 0.5, **_YARN},
        ),
        seed=2,
    ),
    "v2-biases": TinySpec(
        "MLP biases, tied embeddings, no dense layer, norm_topk_prob without effect, default RoPE",
        _v2(mlp_bias=True, tie_word_embeddings=True, first_k_dense_replace=0, norm_topk_prob=True, num_hidden_layers=2),
        seed=3,
    ),
    "v2-linear": TinySpec(
        "linear RoPE, value heads narrower than key heads, groups with greedy, two dense layers",
        _v2(
            n_group=4,
            topk_group=2,
            v_head_dim=8,
            first_k_dense_replace=2,
            num_hidden_layers=4,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
        seed=4,
    ),
    "v3-yarn": TinySpec(
        "sigmoid gate with bias and groups, YaRN, interleaved RoPE, a layer of multi-token prediction",
        _v3(rope_scaling={"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **_YARN}),
        seed=5,
    ),
    "v3-unnormalised": TinySpec(
        "q_lora_rank null, norm_topk_prob false, RoPE not interleaved, default RoPE in the new form",
        _v3(
            q_lora_rank=None,
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            rope_interleave=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
        seed=6,
    ),
    "v3-dynamic": TinySpec(
        "dynamic RoPE past its length, attention biases, tied embeddings, no dense layer",
        _v3(
            attention_bias=True,
            tie_word_embeddings=True,
            first_k_dense_replace=0,
            num_hidden_layers=2,
            max_position_embeddings=48,
            rope_scaling={"type": "dynamic", "factor": 8.0},
        ),
        seed=7,
    ),
    "v3-two-groups": TinySpec(
        "two groups of which one is chosen, two shared experts, llama3 RoPE",
        _v3(n_routed_experts=16, n_group=2, topk_group=1, n_shared_experts=2, rope_parameters={**_LLAMA3, "rope_theta": 10000.0}),
        seed=8,
    ),
    "mixtral": TinySpec("top-2 of 8, grouped queries, default RoPE", _mixtral(), seed=9),
    "mixtral-window": TinySpec(
        "sliding window shorter than the context, 16 experts, top-3",
        _mixtral(sliding_window=24, num_local_experts=16, num_experts_per_tok=3),
        10,
    ),
    "mixtral-yarn": TinySpec(
        "head_dim of its own, tied embeddings, YaRN without mscale, not truncated",
        _mixtral(
            head_dim=24,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "truncate": False, **_YARN},
        ),
        seed=11,
    ),
    "mixtral-window-llama3": TinySpec(
        "sliding window with llama3 RoPE, one KV head",
        _mixtral(sliding_window=40, num_key_value_heads=1, head_dim=16, rope_parameters={**_LLAMA3, "rope_theta": 50000.0}),
        seed=12,
    ),
    "llama": TinySpec("multi-head attention, attention and MLP biases, default RoPE", _llama(attention_bias=True, mlp_bias=True), 13),
    "llama-llama3": TinySpec(
        "grouped queries, head_dim of its own, tied embeddings, llama3 RoPE",
        _llama(num_key_value_heads=2, head_dim=24, tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=_LLAMA3),
        seed=14,
    ),
    "llama-linear": TinySpec(
        "linear RoPE in the old form, one KV head", _llama(num_key_value_heads=1, rope_scaling={"type": "linear", "factor": 4.0}), 15
    ),
    "llama-dynamic": TinySpec(
        "dynamic RoPE past its length", _llama(max_position_embeddings=48, rope_scaling={"rope_type": "dynamic", "factor": 8.0}), 16
    ),
    "llama-yarn": TinySpec(
        "YaRN with an attention factor of its own",
        _llama(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": 1.2, **_YARN}),
        17,
    ),
}


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
