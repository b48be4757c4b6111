"""Attention of prompts' chunks in float32 on a CPU: blocks of queries against all the keys that they see, by the tiles of `cpu_product`.

Scores are one product of a block, with keys in the place of a weight's rows; the sums of values are another, with values transposed.
What no query of a block sees is not multiplied. One thread takes a third of torch's time for 512 tokens, and half of it for 8192.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cpu_exp import exp, highest_of
from model.cpu_parts import array_at, bits, inner, job, real, take, word
from model.cpu_product import product
from model.cpu_threads import num_shares_of, run_shares
from model.cpu_tile import NUM_TOKENS

_Array = npt.NDArray[Any]
# Numbers of a block's scores, which stay in a core's own cache; and queries of a block at most.
_BLOCK_SCORES = 1 << 16
_MOST_QUERIES = 8 * NUM_TOKENS


class Heads(NamedTuple):
    """What attends and is attended to: a head is its own part [*, heads, own] and, behind it, one that RoPE turns, [*, heads, rope].

    Queries are of T tokens, keys and values of K; fewer KV heads are shared by as many query heads each, in order. All keys may have
    one turned part, [K, 1, rope]; heads without one have widths of 0. float32, the last dimension contiguous.
    """

    query: Tensor
    query_rope: Tensor
    key: Tensor
    key_rope: Tensor
    value: Tensor


@functools.cache
def prepare() -> int:
    """The job, compiled: seconds the first time on a machine and milliseconds after."""
    return job(_attend_chunks)


def attend_chunks(heads: Heads, chunks: Tensor, scale: float, window: int | None, out: Tensor) -> None:
    """Softmax over what each query sees, times the values, into its rows of out [T, heads, value].

    chunks [n, 4] int64: the first query, how many, the first key, how many; the last query stands where the last key does, each sees the
    keys up to its own place, no more than `window` of them.
    """
    num_heads, width = heads.query.shape[1], heads.query.shape[2] + heads.query_rope.shape[2]
    for each in heads:
        assert each.dtype == torch.float32, "from here on there are only addresses"
        assert each.stride(2) == 1 or each.shape[2] < 2
    assert out.is_contiguous()
    assert out.dtype == torch.float32
    assert out.shape == (len(heads.query), num_heads, heads.value.shape[2])
    assert chunks.is_contiguous()
    assert chunks.dtype == torch.int64
    places = [number for each in heads for number in (each.data_ptr(), each.stride(0), each.stride(1))]
    sizes = (num_heads, heads.key.shape[1], heads.key_rope.shape[1], heads.query.shape[2], heads.query_rope.shape[2], heads.value.shape[2])
    words = (*places, *sizes, out.data_ptr(), chunks.data_ptr(), len(chunks), bits(scale), window or 0)
    num_pairs = sum(queries * (keys - queries // 2) for _, queries, _, keys in chunks.tolist())
    num_shares = num_shares_of(num_pairs * num_heads * (width + heads.value.shape[2]))
    run_shares(prepare(), words, min(num_shares, num_heads * len(chunks)))


def _attend_chunks(block: int) -> int:
    num_heads, num_chunks = word(block, 16), word(block, 24)
    chunks = array_at(np.empty(0, np.int64), word(block, 23), (num_chunks, 4))
    unit = take(block, 1)
    while unit < num_chunks * num_heads:
        first_query, num_queries, first_key, num_keys = chunks[unit // num_heads]
        _attend_head(block, unit % num_heads, first_query, num_queries, first_key, num_keys)
        unit = take(block, 1)
    return 1


@inner
def _rows(block: int, place: int, first: int, head: int) -> Any:
    """(address of a head's part of a token, numbers from one token to the next) of the tensor that begins at word `place`."""
    step = word(block, place + 1)
    return word(block, place) + 4 * (first * step + head * word(block, place + 2)), step


@inner
def _gather(address: int, step: int, num_rows: int, length: int, factor: float, target: _Array, start: int) -> None:
    """Rows of `length` numbers, times the factor, into columns of the target [rows, *] from `start` on."""
    if num_rows > 0 and length > 0:
        rows = array_at(target[0, :0], address, ((num_rows - 1) * step + length,))
        for row in range(num_rows):
            _scale(rows[row * step : row * step + length], factor, target[row, start : start + length])


@inner
def _scale(source: _Array, factor: float, target: _Array) -> None:
    for n in range(len(target)):
        target[n] = source[n] * factor


@inner
def _transpose(address: int, step: int, num_rows: int, target: _Array) -> None:
    """Rows of `len(target)` numbers into columns of the target, a cache line of each of its rows at a time."""
    length = len(target)
    rows = array_at(target[0, :0], address, ((num_rows - 1) * step + length,))
    for start in range(0, num_rows, 16):
        end = min(start + 16, num_rows)
        source = rows[start * step : (end - 1) * step + length]
        for n in range(length):
            line = target[n, start:end]
            for row in range(len(line)):
                line[row] = source[row * step + n]


@inner
def _attend_head(block: int, head: int, first_query: int, num_queries: int, first_key: int, num_keys: int) -> None:
    num_heads, own, rope, value = word(block, 16), word(block, 19), word(block, 20), word(block, 21)
    kv_head = head * word(block, 17) // num_heads
    scale, window, width = np.float32(real(block, 25)), word(block, 26), own + rope

    keys = np.empty((num_keys, width), np.float32)
    address, step = _rows(block, 7, first_key, kv_head)
    _gather(address, step, num_keys, own, np.float32(1), keys, 0)
    address, step = _rows(block, 10, first_key, head * word(block, 18) // num_heads)
    _gather(address, step, num_keys, rope, np.float32(1), keys, own)
    address, step = _rows(block, 13, first_key, kv_head)
    values_step = num_keys + 16  # rows a power of two apart would want the same places of the cache
    values = np.empty((value, values_step), np.float32)
    _transpose(address, step, num_keys, values)

    most = max(NUM_TOKENS, min(_MOST_QUERIES, _BLOCK_SCORES // num_keys // NUM_TOKENS * NUM_TOKENS))
    queries, scores = np.empty((most, width), np.float32), np.empty(most * num_keys, np.float32)
    for start in range(0, num_queries, most):
        size = min(most, num_queries - start)
        address, step = _rows(block, 1, first_query + start, head)
        _gather(address, step, size, own, scale, queries, 0)
        address, step = _rows(block, 4, first_query + start, head)
        _gather(address, step, size, rope, scale, queries, own)
        last = num_keys - num_queries + start + size  # what the block's last query sees ends here
        first = max(0, last - size + 1 - window) if window else 0
        seen = last - first
        place = keys.ctypes.data + 4 * first * width
        product(keys[0, :0], place, width, seen, queries.ctypes.data, size, scores.ctypes.data, seen, width)
        for i in range(size):
            end = seen - size + 1 + i
            begin = max(0, end - window) if window else 0
            _soften(scores[i * seen : (i + 1) * seen], begin, end)
        target = word(block, 22) + 4 * ((first_query + start) * num_heads + head) * value
        product(keys[0, :0], values.ctypes.data + 4 * first, values_step, value, scores.ctypes.data, size, target, num_heads * value, seen)


@inner
def _soften(scores: _Array, begin: int, end: int) -> None:
    """Scores from `begin` to `end` become their softmax, the others 0."""
    seen, total = scores[begin:end], np.float32(0)
    highest = highest_of(seen)
    for n in range(len(seen)):
        seen[n] = exp(seen[n] - highest)
        total += seen[n]
    _scale(seen, np.float32(1) / total, seen)
    scores[:begin] = 0
    scores[end:] = 0
