"""Every tiny checkpoint against transformers: logits, greedy tokens, alone and in ragged batches, chunked, in every stored form."""

import random
from pathlib import Path

import pytest
import torch

from model.architectures import ARCHITECTURES
from tests.reference.local_generation import LocalGenerator, LocalSequence
from tests.tiny_models import (
    EOS_TOKEN_IDS,
    TIE,
    TINY,
    VOCABULARY,
    assert_greedy_equal,
    oracle,
    oracle_greedy,
    oracle_logits,
    write_tiny,
)

torch.set_num_threads(1)
ONE_OF_EACH = ["v2-groups", "v3-yarn", "mixtral-window", "llama-llama3"]
TOLERANCE = 1e-4


def random_prompt(length: int, seed: int = 0) -> list[int]:
    drawn = random.Random(seed * 1000 + length)
    return [drawn.randrange(VOCABULARY) for _ in range(length)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"off by {error:.1e} of the largest logit"


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def generator(name: str, tmp_path_factory: pytest.TempPathFactory) -> LocalGenerator:
    return LocalGenerator.load(write_tiny(name, tmp_path_factory.mktemp(name)))


def test_each_family_has_four_checkpoints() -> None:
    for model_type in ARCHITECTURES:
        assert sum(spec.config["model_type"] == model_type for spec in TINY.values()) >= 4


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_logits_of_a_prompt(name: str, generator: LocalGenerator, chunk: int) -> None:
    prompt = random_prompt(150)
    assert_close(generator.prompt_logits(prompt, chunk), oracle_logits(oracle(name), prompt))


@pytest.mark.parametrize("is_read_in_place", [True, False])
def test_prompts_in_one_step(name: str, generator: LocalGenerator, monkeypatch: pytest.MonkeyPatch, is_read_in_place: bool) -> None:
    """Short ones before long ones, whole and in two parts, of which some are one token; in compiled code, and as a GPU does it."""
    monkeypatch.setattr(generator.cache, "is_read_in_place", is_read_in_place)
    prompts = [random_prompt(length, seed=2) for length in (5, 60, 2, 100, 3)]
    whole, halved = ([LocalSequence(list(prompt), len(prompt)) for prompt in prompts] for _ in range(2))
    at_once = generator.step([(sequence, sequence.prompt_len) for sequence in whole])
    firsts = generator.step([(sequence, sequence.prompt_len // 2) for sequence in halved])
    seconds = generator.step([(sequence, sequence.prompt_len - sequence.num_cached) for sequence in halved])
    for sequence in (*whole, *halved):
        generator.free_pages += sequence.pages
    for prompt, found, first, second in zip(prompts, at_once, firsts, seconds, strict=True):
        expected = oracle_logits(oracle(name), prompt)
        assert_close(found, expected)
        assert_close(torch.cat((first, second)), expected)


@pytest.mark.parametrize(("prompt_length", "chunk"), [(1, 64), (20, 7), (45, 64)])
def test_greedy_alone(name: str, generator: LocalGenerator, prompt_length: int, chunk: int) -> None:
    prompt = random_prompt(prompt_length)
    expected = oracle_greedy(oracle(name), prompt, 64)
    assert len(set(expected.token_ids)) > 16
    (found,) = generator.greedy([prompt], 64, chunk)
    assert_greedy_equal(found, expected.token_ids, expected.margins)


def test_greedy_in_a_ragged_batch(name: str, generator: LocalGenerator) -> None:
    """16 prompts of 1 to 200 tokens, 7 at a step: the short ones decode while the long ones are read."""
    prompts = [random_prompt(length, seed=1) for length in (1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 48, 49, 64, 90, 130, 200)]
    model = oracle(name)
    for prompt, found in zip(prompts, generator.greedy(prompts, 64, chunk=7), strict=True):
        if generator.model.config.rope.kind == "dynamic":  # type: ignore[attr-defined]
            expected = oracle_greedy(model, prompt, 64)
            assert_greedy_equal(found, expected.token_ids, expected.margins)
        else:
            # Each of our tokens follows from those before it: one pass of the oracle judges all of them.
            logits = oracle_logits(model, prompt + found)[len(prompt) - 1 : -1]
            best = logits.max(dim=-1).values
            lost = best - logits.gather(1, torch.tensor(found).unsqueeze(1)).squeeze(1)
            assert lost.max() < TIE, f"prompt of {len(prompt)}: worse than the oracle's best by {lost.max():.5f}"


@pytest.mark.parametrize("tiny", ONE_OF_EACH)
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float8"])
def test_stored_types(tiny: str, storage: str, tmp_path: Path) -> None:
    prompt = random_prompt(40)
    loaded = LocalGenerator.load(write_tiny(tiny, tmp_path, storage=storage))  # type: ignore[arg-type]
    expected = oracle_logits(oracle(tiny, storage), prompt)  # type: ignore[arg-type]
    assert_close(loaded.prompt_logits(prompt, 64), expected)
    assert not torch.allclose(expected, oracle_logits(oracle(tiny), prompt), rtol=1e-4)


@pytest.mark.parametrize("tiny", ONE_OF_EACH)
def test_fused_experts_in_shards(tiny: str, tmp_path: Path) -> None:
    directory = write_tiny(tiny, tmp_path, experts="fused", max_shard_size=100_000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    prompt = random_prompt(40)
    assert_close(LocalGenerator.load(directory).prompt_logits(prompt, 64), oracle_logits(oracle(tiny), prompt))


@pytest.mark.parametrize("tiny", TINY)
def test_what_transformers_saves(tiny: str, tmp_path: Path) -> None:
    """Its own config.json and its own choice of names."""
    model = oracle(tiny)
    model.save_pretrained(tmp_path)
    prompt = random_prompt(40)
    assert_close(LocalGenerator.load(tmp_path).prompt_logits(prompt, 64), oracle_logits(model, prompt))


def test_end_tokens_come_from_generation_config(generator: LocalGenerator) -> None:
    assert generator.model.config.eos_token_ids == tuple(EOS_TOKEN_IDS)
