"""How llama.cpp names and lays out a checkpoint's tensors: `deepseek2` for deepseek_v2, `llama` for Mixtral.

`deepseek2` must have a query LoRA unless a model has as many layers as one of those it knows: ours get one that changes nothing, the
identity and a norm of ones behind a norm of ones.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
DEEPSEEK = NORMS | {
    "self_attn.q_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
MIXTRAL = NORMS | {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
MIXTRAL_EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")


def interleaved(weight: Array, num_heads: int) -> Array:
    """Rows of each head in the order in which llama.cpp turns them: the two of a rotated pair side by side, not half a head apart."""
    half = weight.shape[0] // num_heads // 2
    return np.concatenate([np.stack((head[:half], head[half:]), axis=1).reshape(2 * half, -1) for head in np.split(weight, num_heads)])


def latent_projections(kv_b: Array, config: Mapping[str, Any]) -> tuple[Array, Array]:
    """kv_b [heads x (nope + value), latent] as k_b [heads, latent, nope], to multiply queries by, and v_b [heads, value, latent]."""
    nope, value, heads = config["qk_nope_head_dim"], config["v_head_dim"], config["num_attention_heads"]
    by_head = kv_b.reshape(heads, nope + value, -1)
    return by_head[:, :nope].transpose(0, 2, 1), by_head[:, nope:]


def converted(names: Iterable[str], tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """llama.cpp's tensors, one after another. ValueError for a tensor that has no place there."""
    is_deepseek = config["model_type"] == "deepseek_v2"
    experts: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if name in OUTER:
            yield OUTER[name], tensors[name]
            continue
        found = LAYER.fullmatch(name)
        if not found:
            raise ValueError(f"{name} has no place in a GGUF file")
        layer, part = found.groups()
        expert = EXPERT.fullmatch(part)
        if expert:
            kind = (EXPERTS if is_deepseek else MIXTRAL_EXPERTS)[expert[2]]
            experts.setdefault((layer, kind), {})[int(expert[1])] = name
        elif is_deepseek and part == "self_attn.kv_b_proj":
            k_b, v_b = latent_projections(tensors[name], config)
            yield f"blk.{layer}.attn_k_b.weight", k_b
            yield f"blk.{layer}.attn_v_b.weight", v_b
        else:
            places = DEEPSEEK if is_deepseek else MIXTRAL
            if part not in places:
                raise ValueError(f"{name} has no place in a GGUF file")
            yield f"blk.{layer}.{places[part]}.weight", _as_llama_turns(part, tensors[name], config)
        if is_deepseek and part == "self_attn.q_proj":
            hidden = config["hidden_size"]
            yield f"blk.{layer}.attn_q_a.weight", np.eye(hidden, dtype=np.float32)
            yield f"blk.{layer}.attn_q_a_norm.weight", np.ones(hidden, dtype=np.float32)
    for (layer, kind), members in experts.items():
        yield f"blk.{layer}.{kind}.weight", np.stack([tensors[members[expert]] for expert in range(len(members))])


def _as_llama_turns(part: str, weight: Array, config: Mapping[str, Any]) -> Array:
    if config["model_type"] != "mixtral" or part not in ("self_attn.q_proj", "self_attn.k_proj"):
        return weight  # deepseek_v2 turns neighbours itself
    heads = config["num_attention_heads"] if part == "self_attn.q_proj" else config["num_key_value_heads"]
    return interleaved(weight, heads)
