"""What a forward pass does rather than what it answers: where it runs, what it keeps, how much it calls."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.architectures import ARCHITECTURES, build
from model.batch import Batch
from model.causal_lm import CausalLM
from model.config import ModelConfig
from model.gate import Routing
from model.kv_cache import PagedCache
from model.weights import ShapeSource
from tests.reference.local_generation import run_forward
from tests.tiny_models import TINY

torch.set_num_threads(1)


class SameExperts:
    """Answers with what it was given; keeps the routings."""

    def __init__(self) -> None:
        self.routings: list[tuple[int, Routing]] = []

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        self.routings.append((layer, routing))
        return hidden

    def combine(self, handle: object) -> Tensor:
        assert isinstance(handle, Tensor)
        return handle


class Calls(TorchDispatchMode):
    """Counts the tensor operations, and keeps the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view is no work; the cache's own storage is always looked at whole.
        if isinstance(result, Tensor) and not func._schema.name.endswith(("view", "reshape", "slice")):  # type: ignore[attr-defined]
            self.count += 1
            if func._schema.name not in ("aten::t", "aten::transpose", "aten::expand", "aten::index_copy_"):  # type: ignore[attr-defined]
                self.largest = max(self.largest, result.numel())
        return result


def config_of(name: str) -> ModelConfig:
    raw = TINY[name].config
    return ARCHITECTURES[raw["model_type"]].config_type.parse(raw, {})


def on(device: str, name: str) -> CausalLM:
    tied = TINY[name].config["tie_word_embeddings"]
    has = lambda tensor: not tensor.endswith("gate_up_proj") and not (tied and tensor == "lm_head.weight")  # noqa: E731
    return build(config_of(name), ShapeSource(device, has=has))


def ragged(device: str, lens: list[tuple[int, int]], page_size: int) -> Batch:
    """Sequences of (query tokens, context)."""
    num_tokens = sum(query for query, _ in lens)
    pages = max(-(-context // page_size) for _, context in lens)
    zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    return Batch(
        token_ids=zeros,
        positions=zeros,
        slots=torch.arange(num_tokens, device=device),
        block_tables=torch.zeros((len(lens), pages), dtype=torch.int64, device=device),
        query_lens=tuple(query for query, _ in lens),
        context_lens=tuple(context for _, context in lens),
        logit_rows=torch.zeros(len(lens), dtype=torch.int64, device=device),
        rope_lengths=zeros,
    )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("lens", [[(9, 9)], [(1, 40), (1, 3)], [(1, 40), (9, 9), (1, 3), (20, 60)]])
def test_runs_on_the_meta_device(name: str, lens: list[tuple[int, int]]) -> None:
    """A tensor without data ends any copy to the CPU with an error."""
    model = on("meta", name)
    cache = PagedCache(model.cache_layout, 8, 16, torch.device("meta"))
    experts = SameExperts()
    logits = run_forward(model, ragged("meta", lens, 16), cache, experts)
    assert logits.device.type == "meta"
    assert logits.shape == (len(lens), model.config.vocab_size)
    assert logits.dtype == torch.float32
    assert tuple(layer for layer, _ in experts.routings) == model.config.moe_layers
    for layer, routing in experts.routings:
        is_last = layer == model.config.num_hidden_layers - 1
        num_tokens = len(lens) if is_last else sum(query for query, _ in lens)
        assert routing.expert_ids.shape == (num_tokens, model.config.num_experts_per_tok)
        assert routing.expert_ids.device.type == routing.weights.device.type == "meta"


@pytest.mark.parametrize("name", TINY)
def test_a_chunk_that_nobody_asks_logits_of_skips_the_last_experts_alone(name: str) -> None:
    """Its keys and values are in the cache of every layer, the last one's too."""
    untouched = 12345.0
    model = on("cpu", name)
    cache = PagedCache(model.cache_layout, 8, 16, torch.device("cpu"))
    for layer in cache.layers:
        for entry in layer:
            entry.fill_(untouched)
    experts = SameExperts()
    batch = replace(ragged("cpu", [(9, 9)], 16), logit_rows=torch.zeros(0, dtype=torch.int64))
    assert run_forward(model, batch, cache, experts).shape == (0, model.config.vocab_size)
    assert tuple(layer for layer, _ in experts.routings) == tuple(
        layer for layer in model.config.moe_layers if layer != model.config.num_hidden_layers - 1
    )
    for layer in cache.layers:
        for entry in layer:
            assert (entry[:9] != untouched).all()
            assert (entry[9:] == untouched).all()


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith("v")])
def test_mla_caches_the_latent_alone(name: str) -> None:
    raw = TINY[name].config
    layout = on("meta", name).cache_layout
    assert layout.entries == ((raw["kv_lora_rank"] + raw["qk_rope_head_dim"],),)
    assert layout.num_layers == raw["num_hidden_layers"]


def test_absorbed_decode_never_expands_the_context() -> None:
    """No result is larger than the latents of the context; keys and values of 4 heads would be 3 times that."""
    model = on("cpu", "v2-lite")
    cache = PagedCache(model.cache_layout, 64, 16, torch.device("cpu"))
    with Calls() as calls:
        run_forward(model, ragged("cpu", [(1, 1000), (1, 900)], 16), cache, SameExperts())
    assert calls.largest <= 2 * 1008 * 40 < 2 * 900 * 4 * (16 + 16)


@pytest.mark.parametrize("name", ["v2-groups", "v3-yarn", "mixtral", "mixtral-window", "llama"])
def test_decodes_are_one_batch(name: str) -> None:
    """As many calls for 16 sequences as for 2."""
    model = on("cpu", name)
    cache = PagedCache(model.cache_layout, 64, 16, torch.device("cpu"))

    def count(num_sequences: int) -> int:
        with Calls() as calls:
            run_forward(model, ragged("cpu", [(1, 40 + n) for n in range(num_sequences)], 16), cache, SameExperts())
        return calls.count

    assert count(16) == count(2)


def test_a_window_bounds_what_a_decode_reads() -> None:
    """1000 tokens of context are read where there is no window, two or three pages where there is one of 24."""

    def largest(name: str) -> int:
        model = on("cpu", name)
        cache = PagedCache(model.cache_layout, 64, 16, torch.device("cpu"))
        cache.is_read_in_place = False  # copied, as elsewhere than on a CPU, so that what is read can be seen
        with Calls() as calls:
            run_forward(model, ragged("cpu", [(1, 1000)], 16), cache, SameExperts())
        return calls.largest

    assert largest("mixtral") >= 1000 * 2 * 16
    assert largest("mixtral-window") < 1000 * 2 * 16 / 10
