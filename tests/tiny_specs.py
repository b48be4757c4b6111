"""The config.json of every tiny checkpoint, by name, and what it is there for."""

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 416


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
