"""One pass over a token against the same by torch: what is asked, what is kept, and where in the cache it lies."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import cpu_rope, cpu_threads
from model.rope import Rotation

torch.set_num_threads(1)
NUM_SLOTS = 24
threads = st.integers(1, 3)
seeds = st.integers(0, 2**31)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation_of(num_tokens: int, dim: int) -> Rotation:
    angles = draw(num_tokens, dim // 2, seed=5)
    return Rotation(angles.cos(), angles.sin())


def slots_of(num_tokens: int, seed: int) -> Tensor:
    return torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(seed))[:num_tokens]


def shared(patch: pytest.MonkeyPatch, num_threads: int) -> None:
    patch.setattr(cpu_threads, "num_shares_of", lambda _: num_threads)


def assert_others_untouched(cache: Tensor, slots: Tensor) -> None:
    others = torch.ones(NUM_SLOTS, dtype=torch.bool)
    others[slots] = False
    assert (cache[others] == 7).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.booleans(), threads, seeds)
def test_latents(
    num_tokens: int, heads: int, nope: int, half_rope: int, rank: int, has_own_query: bool, num_threads: int, seed: int
) -> None:
    rope, eps = 2 * half_rope, 1e-6
    down = draw(num_tokens, heads * (nope + rope) + rank + rope, seed=seed)
    query = down[:, : heads * (nope + rope)]
    if has_own_query:
        query = draw(num_tokens, heads * (nope + rope), seed=seed + 1)
    weight, rotation, slots = draw(rank, seed=seed + 2), rotation_of(num_tokens, rope), slots_of(num_tokens, seed)
    cache = torch.full((NUM_SLOTS, rank + rope), 7.0)
    with pytest.MonkeyPatch.context() as patch:
        shared(patch, num_threads)
        query_nope, query_rope, latents = cpu_rope.place_latents(query, down, nope, weight, eps, rotation, slots, cache)
    per_head = query.reshape(num_tokens, heads, nope + rope)
    latent, key = torch.split(down[:, -(rank + rope) :], [rank, rope], dim=1)
    expected = torch.cat((F.rms_norm(latent, (rank,), weight, eps), rotation(key.unsqueeze(1)).squeeze(1)), dim=1)
    assert torch.equal(query_nope, per_head[..., :nope])
    torch.testing.assert_close(query_rope, rotation(per_head[..., nope:]))
    torch.testing.assert_close(latents, expected)
    assert torch.equal(cache[slots], latents)
    assert_others_untouched(cache, slots)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), threads, seeds)
def test_heads(num_tokens: int, num_kv: int, share: int, half: int, num_threads: int, seed: int) -> None:
    dim, heads = 2 * half, share * num_kv
    qkv, rotation, slots = draw(num_tokens, (heads + 2 * num_kv) * dim, seed=seed), rotation_of(num_tokens, dim), slots_of(num_tokens, seed)
    caches = [torch.full((NUM_SLOTS, num_kv, dim), 7.0) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        shared(patch, num_threads)
        queries, keys, values = cpu_rope.place_heads(qkv, heads, rotation, slots, *caches)
    per_head = qkv.view(num_tokens, -1, dim)
    torch.testing.assert_close(queries, rotation(per_head[:, :heads]))
    torch.testing.assert_close(keys, rotation(per_head[:, heads : heads + num_kv]))
    assert torch.equal(values, per_head[:, heads + num_kv :])
    for cache, placed in zip(caches, (keys, values), strict=True):
        assert torch.equal(cache[slots], placed)
        assert_others_untouched(cache, slots)
