"""The two seeded checkpoints that all sides serve, in bfloat16 as one from the hub would be.

Their vocabulary is text: nearly every id stands for printable ASCII, so that no engine holds a token's text back until the bytes of a
character are whole, and a client's gaps are the engine's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from tests.benchmarks import benchmark_model
from tests.benchmarks.benchmark_model import SPECIAL_TOKENS, save_tokenizer, write_checkpoint
from tests.benchmarks.peers.environments import PEERS_DIRECTORY

CHECKPOINTS_DIRECTORY = PEERS_DIRECTORY / "checkpoints"
VOCAB_SIZE, MAX_LENGTH, SEED = 32000, 4096, 0

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "max_position_embeddings": MAX_LENGTH,
    "model_type": "mixtral",
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


@dataclass(frozen=True)
class Shape:
    """A checkpoint: its `model_type` and how to have it on disk."""

    name: str
    checkpoint: Callable[[], Path]


def deepseek_checkpoint() -> Path:
    """benchmark_model's, with the vocabulary of text, and its one group of experts told as DeepSeek-V2-Lite tells it: vLLM asks."""
    config = benchmark_model.CONFIG | {"n_group": 1, "topk_group": 1}
    generator = torch.Generator().manual_seed(SEED)
    shards = benchmark_model.seeded_shards(generator)
    return write_checkpoint(CHECKPOINTS_DIRECTORY / f"deepseek-v2-340m-seed{SEED}", config, shards, torch.bfloat16, write_text_tokenizer)


def mixtral_checkpoint() -> Path:
    """343M parameters: 8 experts, two for each token."""
    generator = torch.Generator().manual_seed(SEED)
    layers = (_mixtral_layer(layer, generator) for layer in range(MIXTRAL["num_hidden_layers"]))
    shards = chain((benchmark_model.outer_tensors(generator),), layers)
    return write_checkpoint(CHECKPOINTS_DIRECTORY / f"mixtral-340m-seed{SEED}", MIXTRAL, shards, torch.bfloat16, write_text_tokenizer)


SHAPES = {shape.name: shape for shape in (Shape("deepseek_v2", deepseek_checkpoint), Shape("mixtral", mixtral_checkpoint))}


def _mixtral_layer(layer: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Scaled by fan-in, as benchmark_model's are; gates as wide as theirs, so that routes spread."""
    prefix, hidden, intermediate = f"model.layers.{layer}", MIXTRAL["hidden_size"], MIXTRAL["intermediate_size"]
    queries = MIXTRAL["num_attention_heads"] * MIXTRAL["head_dim"]
    keys = MIXTRAL["num_key_value_heads"] * MIXTRAL["head_dim"]

    def weight(name: str, rows: int, columns: int) -> tuple[str, Tensor]:
        return f"{prefix}.{name}.weight", torch.randn((rows, columns), generator=generator) * columns**-0.5

    yield f"{prefix}.input_layernorm.weight", torch.ones(hidden)
    yield f"{prefix}.post_attention_layernorm.weight", torch.ones(hidden)
    yield weight("self_attn.q_proj", queries, hidden)
    yield weight("self_attn.k_proj", keys, hidden)
    yield weight("self_attn.v_proj", keys, hidden)
    yield weight("self_attn.o_proj", hidden, queries)
    yield weight("block_sparse_moe.gate", MIXTRAL["num_local_experts"], hidden)
    for expert in range(MIXTRAL["num_local_experts"]):
        yield weight(f"block_sparse_moe.experts.{expert}.w1", intermediate, hidden)
        yield weight(f"block_sparse_moe.experts.{expert}.w3", intermediate, hidden)
        yield weight(f"block_sparse_moe.experts.{expert}.w2", hidden, intermediate)


def text_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges: the bytes, then pairs and triples of printable ASCII."""
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    pairs = [(first, second) for first in printable for second in printable]
    triples = [(first + second, third) for first, second in pairs for third in printable]
    merges = [*pairs, *triples][: VOCAB_SIZE - len(vocab)]
    vocab.update({first + second: len(vocab) + rank for rank, (first, second) in enumerate(merges)})
    return vocab, merges


def write_text_tokenizer(directory: Path) -> None:
    vocab, merges = text_vocabulary()
    save_tokenizer(directory, vocab, merges, MAX_LENGTH)
