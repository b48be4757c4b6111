"""Attention of one query token a sequence over the paged cache, for a CPU: pages are read where they lie, and nothing is gathered.

The products are those of `model.cpu_product`, with a page's keys in the place of a weight's rows. All is float32 but the maps to and
from latents, which are read as they are stored.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.attention import DecodeGroup
from model.cpu_exp import exp, highest_of
from model.cpu_parts import array_at, bits, inner, job, real, take, word
from model.cpu_product import job_of, product
from model.cpu_threads import Call, run
from model.cpu_tile import NUM_TOKENS

_Array = npt.NDArray[Any]
# Keys that are scored before their values are added up: both are read from memory once if a block stays in a core's own cache.
_BLOCK_SLOTS = 128


@functools.cache
def prepare_grouped() -> int:
    """The job of `grouped`, compiled: seconds the first time on a machine and milliseconds after."""
    return job(_grouped)


@functools.cache
def prepare_latent(dtype: torch.dtype) -> int:
    """The job of `latent` for a storage type of its weights, compiled."""
    return job_of(_latent_of, dtype)


def grouped(queries: Tensor, keys: Tensor, values: Tensor, scale: float, group: DecodeGroup, page_size: int) -> Tensor:
    """[D, heads, dim] of queries [D, heads, dim] over keys and values [slots, kv_heads, dim]; heads share KV heads in order."""
    num_sequences, num_heads, dim = queries.shape
    num_slots, num_kv = keys.shape[:2]
    assert keys.shape == values.shape == (num_slots, num_kv, dim), "from here on there are only addresses"
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert queries.stride()[1:] == (dim, 1)
    assert queries.dtype == keys.dtype == values.dtype == torch.float32
    out = torch.empty((num_sequences, num_heads, dim), dtype=torch.float32)
    seen, num_operations = _Seen(group), num_sequences * num_heads * group.span.length * 2 * dim
    places = (queries.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr())
    words = (*seen.words, page_size, 0, *places, num_heads, dim, num_slots, num_kv, queries.stride(0), bits(scale))
    run(Call(prepare_grouped(), words, 7, num_operations, num_sequences), (out, *seen.tensors))
    return out


def latent(
    query_nope: Tensor,
    query_rope: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    latents: Tensor,
    scale: float,
    group: DecodeGroup,
    page_size: int,
) -> Tensor:
    """Absorbed MLA: [D, heads, value] of query_nope [D, heads, nope] and query_rope [D, heads, rope] over latents [slots, rank + rope].

    key_up [heads, rank, nope] and value_up [heads, value, rank] are of a type in `cpu_product.CARRIERS`, a head's rows contiguous.
    """
    num_heads, value, rank = value_up.shape
    assert key_up.dtype == value_up.dtype
    assert key_up.shape == (num_heads, rank, query_nope.shape[2])
    assert key_up[0].is_contiguous()
    assert value_up[0].is_contiguous()
    assert latents.is_contiguous()
    assert query_nope.dtype == query_rope.dtype == latents.dtype == torch.float32
    num_slots, width = latents.shape
    assert width == rank + query_rope.shape[2]
    query_nope, query_rope = query_nope.contiguous(), query_rope.contiguous()
    out = torch.empty((len(query_nope), num_heads, value), dtype=torch.float32)
    maps = (key_up.data_ptr(), key_up.stride(0), value_up.data_ptr(), value_up.stride(0))
    seen = _Seen(group)
    num_operations = group.span.length * (width + rank) + rank * (query_nope.shape[2] + value)
    places = (query_nope.data_ptr(), query_rope.data_ptr(), *maps, latents.data_ptr(), out.data_ptr(), bits(scale))
    sizes = (num_heads, query_nope.shape[2], query_rope.shape[2], rank, value, num_slots)
    words = (*seen.words, page_size, 0, *places, *sizes)
    # A part reads both maps: not for less than a tile of sequences, where there are so many.
    call = Call(prepare_latent(key_up.dtype), words, 7, len(out) * num_heads * num_operations, len(out), NUM_TOKENS)
    run(call, (out, *seen.tensors))
    return out


class _Seen:
    """What each sequence of a group sees, as the first words of a block; it must live as long as they are used."""

    def __init__(self, group: DecodeGroup) -> None:
        tables, first, last = self.tensors = group.span.tables.contiguous(), group.first.contiguous(), group.last.contiguous()
        assert tables.dtype == first.dtype == last.dtype == torch.int64
        num_sequences, num_pages = tables.shape
        self.words = (num_sequences, num_pages, tables.data_ptr(), first.data_ptr(), last.data_ptr())


@inner
def _seen_of(block: int) -> Any:
    """(tables [D, P], first [D], last [D]) as `_Seen` gave them."""
    ints, num_sequences = np.empty(0, np.int64), word(block, 1)
    tables = array_at(ints, word(block, 3), (num_sequences, word(block, 2)))
    return tables, array_at(ints, word(block, 4), (num_sequences,)), array_at(ints, word(block, 5), (num_sequences,))


def _grouped(block: int) -> int:
    tables, firsts, lasts = _seen_of(block)
    page_size, part = word(block, 6), word(block, 7)
    num_heads, dim, num_slots, num_kv = word(block, 12), word(block, 13), word(block, 14), word(block, 15)
    floats, num_sequences = np.empty(0, np.float32), len(tables)
    scale = np.float32(real(block, 17))
    values = array_at(floats, word(block, 10), (num_slots, num_kv * dim))
    out = array_at(floats, word(block, 11), (num_sequences, num_heads, dim))
    share = num_heads // num_kv
    scores, scaled = np.empty((share, _block_of(page_size)), np.float32), np.empty((share, dim), np.float32)
    first = take(block, part)
    while first < num_sequences:
        for d in range(first, min(first + part, num_sequences)):
            queries = array_at(floats, word(block, 8) + 4 * d * word(block, 16), (num_heads, dim))
            for kv in range(num_kv):
                mine, place = slice(kv * share, (kv + 1) * share), word(block, 9) + 4 * kv * dim
                for head in range(share):
                    for i in range(dim):
                        scaled[head, i] = queries[kv * share + head, i] * scale
                _attend(scaled, place, num_kv * dim, values, kv * dim, tables[d], firsts[d], lasts[d], page_size, scores, out[d, mine])
        first = take(block, part)
    return 1


def _latent_of(like: _Array) -> Callable[[int], int]:
    def latent(block: int) -> int:
        tables, firsts, lasts = _seen_of(block)
        page_size, part, scale = word(block, 6), word(block, 7), real(block, 16)
        key_up, key_up_step, value_up, value_up_step = word(block, 10), word(block, 11), word(block, 12), word(block, 13)
        num_heads, nope, rope, rank, value = word(block, 17), word(block, 18), word(block, 19), word(block, 20), word(block, 21)
        floats, num_sequences = np.empty(0, np.float32), len(tables)
        query_nope = array_at(floats, word(block, 8), (num_sequences, num_heads, nope))
        query_rope = array_at(floats, word(block, 9), (num_sequences, num_heads, rope))
        latents = array_at(floats, word(block, 14), (word(block, 22), rank + rope))
        out = array_at(floats, word(block, 15), (num_sequences, num_heads, value))
        first = take(block, part)
        while first < num_sequences:
            last = min(first + part, num_sequences)
            _latent_part(
                like,
                query_nope[first:last],
                query_rope[first:last],
                key_up,
                key_up_step,
                value_up,
                value_up_step,
                latents,
                scale,
                tables[first:last],
                firsts[first:last],
                lasts[first:last],
                page_size,
                out[first:last],
            )
            first = take(block, part)
        return 1

    return latent


@inner
def _latent_part(
    like: _Array,
    query_nope: _Array,
    query_rope: _Array,
    key_up: int,
    key_up_step: int,
    value_up: int,
    value_up_step: int,
    latents: _Array,
    scale: float,
    tables: _Array,
    firsts: _Array,
    lasts: _Array,
    page_size: int,
    out: _Array,
) -> None:
    num, num_heads, nope = query_nope.shape
    width = latents.shape[1]
    rank = width - query_rope.shape[2]
    queries = np.empty((num, num_heads, width), np.float32)
    without_position = np.empty((num, nope), np.float32)
    for head in range(num_heads):
        for d in range(num):
            for n in range(nope):
                without_position[d, n] = query_nope[d, head, n] * np.float32(scale)
            for r in range(width - rank):
                queries[d, head, rank + r] = query_rope[d, head, r] * np.float32(scale)
        weight, place = key_up + head * key_up_step * like.itemsize, queries.ctypes.data + 4 * head * width
        product(like, weight, nope, rank, without_position.ctypes.data, num, place, num_heads * width, nope)
    scores = np.empty((num_heads, _block_of(page_size)), np.float32)
    summed = np.empty((num_heads, rank), np.float32)
    sums = np.empty((num_heads, num, rank), np.float32)
    for d in range(num):
        _attend(queries[d], latents.ctypes.data, width, latents, 0, tables[d], firsts[d], lasts[d], page_size, scores, summed)
        for head in range(num_heads):
            sums[head, d] = summed[head]
    step, value = out.shape[1] * out.shape[2], out.shape[2]
    for head in range(num_heads):
        weight, place = value_up + head * value_up_step * like.itemsize, out.ctypes.data + 4 * head * value
        product(like, weight, rank, value, sums[head].ctypes.data, num, place, step, rank)


@inner
def _block_of(page_size: int) -> int:
    return max(1, _BLOCK_SLOTS // page_size) * page_size


@inner
def _attend(
    queries: _Array,
    keys: int,
    key_step: int,
    values: _Array,
    start: int,
    table: _Array,
    first: int,
    last: int,
    page_size: int,
    scores: _Array,
    out: _Array,
) -> None:
    """Out [Q, n]: softmax over [first, last) of queries [Q, width] with the keys, times the values [slots, start : start + n].

    Block after block, as wide as scores [Q, *]: what came before fades as a larger score comes (Milakov & Gimelshein 2018).
    """
    out[:] = 0
    most = np.full(len(queries), -np.inf, np.float32)
    totals = np.zeros(len(queries), np.float32)
    num_pages = scores.shape[1] // page_size
    for page in range(first // page_size, (last + page_size - 1) // page_size, num_pages):
        low, high = max(first - page * page_size, 0), min(last - page * page_size, scores.shape[1])
        _score(keys, key_step, queries, table[page:], high, page_size, scores)
        for q in range(len(queries)):
            row = scores[q, low:high]
            highest = max(most[q], highest_of(row))
            fading = exp(most[q] - highest)
            most[q] = highest
            total = np.float32(0)
            for i in range(len(row)):
                row[i] = exp(row[i] - highest)
                total += row[i]
            totals[q] = totals[q] * fading + total
            if page * page_size > first:
                _fade(out[q], fading)
        _add_up(scores, values, start, table[page:], low, high, page_size, out)
    for q in range(len(queries)):
        _fade(out[q], np.float32(1) / totals[q])


@inner
def _fade(out: _Array, factor: float) -> None:
    for n in range(len(out)):
        out[n] *= factor


@inner
def _score(keys: int, step: int, queries: _Array, table: _Array, last: int, page_size: int, scores: _Array) -> None:
    """Scores [Q, :last] of queries [Q, width] with the keys, `step` numbers apart, of the table's pages."""
    for page in range((last + page_size - 1) // page_size):
        rows = min(page_size, last - page * page_size)
        place = keys + 4 * table[page] * page_size * step
        target = scores.ctypes.data + 4 * page * page_size
        product(scores[0, :0], place, step, rows, queries.ctypes.data, len(queries), target, scores.shape[1], queries.shape[1])


@inner
def _add_up(weights: _Array, values: _Array, start: int, table: _Array, first: int, last: int, page_size: int, out: _Array) -> None:
    """Adds to out [Q, n] the weights [Q, keys] times `n` of the values [slots, *] from `start` on, four slots of a page at a time."""
    end = start + out.shape[1]
    i = first
    while i < last:
        slot = table[i // page_size] * page_size + i % page_size
        if i + 4 <= last and i % page_size + 4 <= page_size:
            a, b, c, d = values[slot, start:end], values[slot + 1, start:end], values[slot + 2, start:end], values[slot + 3, start:end]
            for q in range(len(weights)):
                _add_four(out[q], a, b, c, d, weights[q, i], weights[q, i + 1], weights[q, i + 2], weights[q, i + 3])
            i += 4
        else:
            for q in range(len(weights)):
                _add_one(out[q], values[slot, start:end], weights[q, i])
            i += 1


@inner
def _add_four(out: _Array, a: _Array, b: _Array, c: _Array, d: _Array, p: float, q: float, r: float, s: float) -> None:
    for n in range(len(out)):
        out[n] += p * a[n] + q * b[n] + r * c[n] + s * d[n]


@inner
def _add_one(out: _Array, a: _Array, p: float) -> None:
    for n in range(len(out)):
        out[n] += p * a[n]
