"""What attention on a CPU asks and keeps of each token, in one pass over it: RoPE, the norm of a latent, the write to the paged cache."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cpu_norm import norm_row
from model.cpu_parts import array_at, bits, inner, job, real, take, word
from model.cpu_threads import Call, run
from model.rope import Rotation

_Array = npt.NDArray[Any]
# Of a product take as long as what is done with one number.
_OPERATIONS = 16


@functools.cache
def prepare_latents() -> int:
    """The job of `place_latents`, compiled: a second the first time on a machine and milliseconds after."""
    return job(_place_latents)


@functools.cache
def prepare_heads() -> int:
    """The job of `place_heads`, compiled."""
    return job(_place_heads)


def place_latents(
    query: Tensor, down: Tensor, nope: int, weight: Tensor, eps: float, rotation: Rotation, slots: Tensor, cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(query_nope [T, heads, nope], query_rope [T, heads, rope], latents [T, rank + rope]); the latents are in cache [slots, *] too.

    query [T, heads * (nope + rope)]; the last rank + rope numbers of down [T, *] are the latent, to be normed by weight [rank] and eps,
    and the key that heads share, to be turned as the queries' last parts are. All float32.
    """
    num_tokens, width, rank = len(query), cache.shape[1], len(weight)
    rope = width - rank
    num_heads = query.shape[1] // (nope + rope)
    _check_places(rotation, slots, num_tokens, rope)
    for each in (query, down, weight, cache):
        assert each.dtype == torch.float32, "from here on there are only addresses"
        assert each.stride(-1) == 1
    assert cache.is_contiguous()
    assert len(down) == num_tokens
    assert down.shape[1] >= width
    assert query.shape[1] == num_heads * (nope + rope)
    query_nope = torch.empty((num_tokens, num_heads, nope), dtype=torch.float32)
    query_rope = torch.empty((num_tokens, num_heads, rope), dtype=torch.float32)
    latents = torch.empty((num_tokens, width), dtype=torch.float32)
    sizes = (num_tokens, 0, num_heads, nope, rope, rank, len(cache))
    latent = down[:, down.shape[1] - width :]
    sources = (query.data_ptr(), query.stride(0), latent.data_ptr(), latent.stride(0), weight.data_ptr(), bits(eps))
    turning = (rotation.cos.data_ptr(), rotation.sin.data_ptr(), slots.data_ptr())
    targets = (cache.data_ptr(), query_nope.data_ptr(), query_rope.data_ptr(), latents.data_ptr())
    made, num_numbers = (query_nope, query_rope, latents), num_tokens * (query.shape[1] + width)
    run(Call(prepare_latents(), (*sizes, *sources, *turning, *targets), 2, _OPERATIONS * num_numbers, num_tokens), made)
    return made


def place_heads(
    qkv: Tensor, num_heads: int, rotation: Rotation, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [T, heads, dim], keys [T, kv_heads, dim], values alike); keys and values are in the caches [slots, kv_heads, dim] too.

    qkv [T, (heads + 2 * kv_heads) * dim]: queries and keys are turned. All float32.
    """
    num_tokens, (num_slots, num_kv, dim) = len(qkv), key_cache.shape
    _check_places(rotation, slots, num_tokens, dim)
    assert qkv.dtype == key_cache.dtype == value_cache.dtype == torch.float32, "from here on there are only addresses"
    assert qkv.is_contiguous()
    assert key_cache.shape == value_cache.shape
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert qkv.shape[1] == (num_heads + 2 * num_kv) * dim
    placed = torch.empty((num_tokens, num_heads + num_kv, dim), dtype=torch.float32)
    sizes = (num_tokens, 0, num_heads, num_kv, dim, num_slots)
    places = (qkv.data_ptr(), rotation.cos.data_ptr(), rotation.sin.data_ptr(), slots.data_ptr())
    targets = (key_cache.data_ptr(), value_cache.data_ptr(), placed.data_ptr())
    run(Call(prepare_heads(), (*sizes, *places, *targets), 2, _OPERATIONS * qkv.numel(), num_tokens), placed)
    return placed[:, :num_heads], placed[:, num_heads:], qkv.view(num_tokens, -1, dim)[:, num_heads + num_kv :]


def _check_places(rotation: Rotation, slots: Tensor, num_tokens: int, dim: int) -> None:
    for each in rotation.cos, rotation.sin:
        assert each.shape == (num_tokens, dim // 2), "from here on there are only addresses"
        assert each.dtype == torch.float32
        assert each.is_contiguous()
    assert slots.shape == (num_tokens,)
    assert slots.dtype == torch.int64
    assert slots.is_contiguous()


def _place_latents(block: int) -> int:
    num_tokens, part, num_heads, nope = word(block, 1), word(block, 2), word(block, 3), word(block, 4)
    rope, rank, floats = word(block, 5), word(block, 6), np.empty(0, np.float32)
    weight, eps = array_at(floats, word(block, 12), (rank,)), real(block, 13)
    cos, sin = array_at(floats, word(block, 14), (num_tokens, rope // 2)), array_at(floats, word(block, 15), (num_tokens, rope // 2))
    slots = array_at(np.empty(0, np.int64), word(block, 16), (num_tokens,))
    cache = array_at(floats, word(block, 17), (word(block, 7), rank + rope))
    query_nope = array_at(floats, word(block, 18), (num_tokens, num_heads, nope))
    query_rope = array_at(floats, word(block, 19), (num_tokens, num_heads, rope))
    latents = array_at(floats, word(block, 20), (num_tokens, rank + rope))
    first = take(block, part)
    while first < num_tokens:
        for t in range(first, min(first + part, num_tokens)):
            query = array_at(floats, word(block, 8) + 4 * t * word(block, 9), (num_heads, nope + rope))
            for head in range(num_heads):
                query_nope[t, head] = query[head, :nope]
                _turn(query[head, nope:], cos[t], sin[t], query_rope[t, head])
            latent = array_at(floats, word(block, 10) + 4 * t * word(block, 11), (rank + rope,))
            norm_row(latent[:rank], weight, eps, latents[t, :rank])
            _turn(latent[rank:], cos[t], sin[t], latents[t, rank:])
            if not 0 <= slots[t] < len(cache):
                return 0
            cache[slots[t]] = latents[t]
        first = take(block, part)
    return 1


def _place_heads(block: int) -> int:
    num_tokens, part, num_heads, num_kv, dim = word(block, 1), word(block, 2), word(block, 3), word(block, 4), word(block, 5)
    floats, num_slots = np.empty(0, np.float32), word(block, 6)
    qkv = array_at(floats, word(block, 7), (num_tokens, num_heads + 2 * num_kv, dim))
    cos, sin = array_at(floats, word(block, 8), (num_tokens, dim // 2)), array_at(floats, word(block, 9), (num_tokens, dim // 2))
    slots = array_at(np.empty(0, np.int64), word(block, 10), (num_tokens,))
    keys, values = array_at(floats, word(block, 11), (num_slots, num_kv, dim)), array_at(floats, word(block, 12), (num_slots, num_kv, dim))
    placed = array_at(floats, word(block, 13), (num_tokens, num_heads + num_kv, dim))
    first = take(block, part)
    while first < num_tokens:
        for t in range(first, min(first + part, num_tokens)):
            for head in range(num_heads + num_kv):
                _turn(qkv[t, head], cos[t], sin[t], placed[t, head])
            if not 0 <= slots[t] < num_slots:
                return 0
            keys[slots[t]] = placed[t, num_heads:]
            values[slots[t]] = qkv[t, num_heads + num_kv :]
        first = take(block, part)
    return 1


@inner
def _turn(x: _Array, cos: _Array, sin: _Array, out: _Array) -> None:
    """`model.rope.Rotation` of one head."""
    half = len(cos)
    for i in range(half):
        first, second = x[i], x[half + i]
        out[i] = first * cos[i] - second * sin[i]
        out[half + i] = second * cos[i] + first * sin[i]
