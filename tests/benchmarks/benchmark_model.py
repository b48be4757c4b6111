"""The seeded checkpoint that the benchmarks serve: `deepseek_v2`, 12 layers, about 340M parameters, all of them random.

    python -m tests.benchmarks.benchmark_model DIR [--dtype bfloat16]

Greedy decoding of random weights falls into loops of few tokens, which would touch few experts: embeddings are large and the gates wide,
so that what a token attends to moves its routes, and a step's batch spreads over the experts as sampled text would.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

BENCHMARK_DIRECTORY = Path(__file__).resolve().parents[2] / "build" / "benchmark"
SPECIAL_TOKENS = ("<s>", "</s>")

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 1408,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 256,
    "n_group": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": None,
    "topk_method": "greedy",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 32000,
}


def benchmark_checkpoint(directory: Path = BENCHMARK_DIRECTORY, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The checkpoint of this dtype and seed below `directory`; written if it is not there, whole or not at all."""
    dtype_name = str(dtype).removeprefix("torch.")
    shards = seeded_shards(torch.Generator().manual_seed(seed))
    return write_checkpoint(directory / f"deepseek-v2-340m-{dtype_name}-seed{seed}", CONFIG, shards, dtype, write_tokenizer)


def seeded_shards(generator: torch.Generator) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The outer tensors, then each layer's; to be drawn in this order."""
    yield outer_tensors(generator)
    for layer in range(CONFIG["num_hidden_layers"]):
        yield _layer_tensors(layer, generator)


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    shards: Iterable[Iterable[tuple[str, Tensor]]],
    dtype: torch.dtype,
    tokenizer: Callable[[Path], None],
) -> Path:
    """`path`, as Hugging Face lays a checkpoint out: the outer tensors' shard, then one a layer. Drawn only if it is not there."""
    if path.exists():
        return path
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_shards = 1 + config["num_hidden_layers"]
    weight_map, total_size = {}, 0
    for number, shard in enumerate(shards, start=1):
        tensors = {name: tensor.to(dtype) for name, tensor in shard}
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, partial / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    write_json(partial / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    tokenizer(partial)
    partial.rename(path)
    return path


def _random(generator: torch.Generator, *shape: int, scale: float) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def outer_tensors(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    vocab_size, hidden_size = CONFIG["vocab_size"], CONFIG["hidden_size"]
    yield "model.embed_tokens.weight", _random(generator, vocab_size, hidden_size, scale=1.0)
    yield "model.norm.weight", torch.ones(hidden_size)
    yield "lm_head.weight", _random(generator, vocab_size, hidden_size, scale=hidden_size**-0.5)


def _layer_tensors(layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors, each scaled by its fan-in so that activations keep their size through the layers."""
    prefix = f"model.layers.{layer}"
    hidden, latent, num_heads = CONFIG["hidden_size"], CONFIG["kv_lora_rank"], CONFIG["num_attention_heads"]
    nope, rope, value = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]

    def weight(name: str, rows: int, columns: int) -> tuple[str, Tensor]:
        return f"{prefix}.{name}.weight", _random(generator, rows, columns, scale=columns**-0.5)

    def ffn(name: str, intermediate: int) -> Iterator[tuple[str, Tensor]]:
        yield weight(f"{name}.gate_proj", intermediate, hidden)
        yield weight(f"{name}.up_proj", intermediate, hidden)
        yield weight(f"{name}.down_proj", hidden, intermediate)

    yield f"{prefix}.input_layernorm.weight", torch.ones(hidden)
    yield f"{prefix}.post_attention_layernorm.weight", torch.ones(hidden)
    yield weight("self_attn.q_proj", num_heads * (nope + rope), hidden)
    yield weight("self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", torch.ones(latent)
    yield weight("self_attn.kv_b_proj", num_heads * (nope + value), latent)
    yield weight("self_attn.o_proj", hidden, num_heads * value)
    if layer < CONFIG["first_k_dense_replace"]:
        yield from ffn("mlp", CONFIG["intermediate_size"])
        return
    yield weight("mlp.gate", CONFIG["n_routed_experts"], hidden)
    yield from ffn("mlp.shared_experts", CONFIG["n_shared_experts"] * CONFIG["moe_intermediate_size"])
    for expert in range(CONFIG["n_routed_experts"]):
        yield from ffn(f"mlp.experts.{expert}", CONFIG["moe_intermediate_size"])


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE in which every id of the vocabulary stands for some bytes: a byte, or two of them merged."""
    byte_characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *byte_characters))}
    pairs = [(first, second) for first in byte_characters for second in byte_characters]
    merges = pairs[: CONFIG["vocab_size"] - len(vocab)]
    vocab.update({first + second: len(vocab) + rank for rank, (first, second) in enumerate(merges)})
    save_tokenizer(directory, vocab, merges, CONFIG["max_position_embeddings"])


def save_tokenizer(directory: Path, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int) -> None:
    """A byte-level BPE of these tokens and merges, as transformers reads it."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", config | {"model_max_length": max_length})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=BENCHMARK_DIRECTORY)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(benchmark_checkpoint(arguments.directory, getattr(torch, arguments.dtype), arguments.seed))


if __name__ == "__main__":
    main()
