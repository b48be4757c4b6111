"""A checkpoint as a GGUF file: run by the Python of llama.cpp's environment.

    python -m tests.benchmarks.peers.gguf_file CHECKPOINT FILE {f32,bf16,f16}

Matrices are stored in the type asked for; vectors and gates in float32, as llama.cpp's own converter has them.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.benchmarks.peers.gguf_tensors import Array, converted
from tests.benchmarks.peers.safetensors_arrays import Arrays

ARCHITECTURES = {"deepseek_v2": "deepseek2", "mixtral": "llama"}
STORAGE = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "f16": gguf.GGMLQuantizationType.F16,
}
FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}


def write_gguf(checkpoint: Path, file: Path, storage: str) -> None:
    """The whole checkpoint, tokenizer included. ValueError for a tensor or dtype that has no place in the file."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])
    writer.add_file_type(FILE_TYPES[storage])
    _add_sizes(writer, config)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    arrays = Arrays(checkpoint)
    for name, array in converted(arrays, arrays, config):
        kind = gguf.GGMLQuantizationType.F32 if keeps_float32(name, array) else STORAGE[storage]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keeps_float32(name: str, array: Array) -> bool:
    return array.ndim == 1 or name.endswith("ffn_gate_inp.weight")


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "mixtral":
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_expert_count(config["num_local_experts"])
        return
    latent, nope, rope = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)  # absorbed: all heads read one latent
    writer.add_q_lora_rank(config["hidden_size"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any]) -> None:
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["</s>"])
    writer.add_add_bos_token(False)


def main() -> None:
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    main()
