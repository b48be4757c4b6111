"""Attention of one query token a sequence over the paged cache, for a CPU: pages are read where they lie, and nothing is gathered.

The products are those of `model.cpu_product`, with a page's keys in the place of a weight's rows. All is float32.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from model.attention import DecodeGroup
from model.cpu_exp import exp
from model.cpu_product import FASTMATH, compiled, product
from model.cpu_threads import num_shares_of, run_shares

_Array = npt.NDArray[Any]
_inner = njit(nogil=True, fastmath=FASTMATH)


@functools.cache
def prepare() -> None:
    """Compiles both, seconds the first time on a machine and milliseconds after."""
    one = torch.zeros((1, 1), dtype=torch.int64)
    group = DecodeGroup.of_tables(one, one[0], one[0] + 1)
    grouped(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), group, 1)
    latent(torch.zeros(1, 1, 2), torch.zeros(1, 2), 1, group, 1)


def grouped(queries: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, page_size: int) -> Tensor:
    """[D, heads, dim] of queries [D, heads, dim], scaled, over keys and values [slots, kv_heads, dim]; heads share KV heads in order."""
    queries = queries.contiguous()
    num_heads, dim = queries.shape[1:]
    out = torch.empty_like(queries)
    arrays = (queries.numpy(), keys.flatten(1).numpy(), values.flatten(1).numpy(), *_seen(group))

    def share(first: int, last: int) -> None:
        _grouped(*arrays, page_size, out.numpy(), first, last)

    run_shares(share, len(queries), num_shares_of(len(queries) * num_heads * group.span.length * 2 * dim))
    return out


def latent(queries: Tensor, latents: Tensor, rank: int, group: DecodeGroup, page_size: int) -> Tensor:
    """[heads, D, rank] of queries [D, heads, width], scaled, over latents [slots, width], whose first `rank` numbers are the values."""
    num_sequences, num_heads, width = queries.shape
    out = torch.empty((num_heads, num_sequences, rank), dtype=torch.float32)
    arrays = (queries.contiguous().numpy(), latents.numpy(), *_seen(group))

    def share(first: int, last: int) -> None:
        _latent(*arrays, page_size, out.numpy(), first, last)

    run_shares(share, num_sequences, num_shares_of(num_sequences * num_heads * group.span.length * (width + rank)))
    return out


def _seen(group: DecodeGroup) -> tuple[_Array, _Array, _Array]:
    return group.span.tables.contiguous().numpy(), group.first.numpy(), group.last.numpy()


@compiled
def _grouped(
    queries: _Array,
    keys: _Array,
    values: _Array,
    tables: _Array,
    firsts: _Array,
    lasts: _Array,
    page_size: int,
    out: _Array,
    first: int,
    last: int,
) -> None:
    num_heads, dim = queries.shape[1:]
    num_kv = keys.shape[1] // dim
    share = num_heads // num_kv
    scores = np.empty((num_heads, tables.shape[1] * page_size), np.float32)
    for d in range(first, last):
        for kv in range(num_kv):
            here = scores[kv * share : (kv + 1) * share]
            query = queries[d, kv * share : (kv + 1) * share]
            _score(keys.ctypes.data + 4 * kv * dim, num_kv * dim, query, tables[d], lasts[d], page_size, here)
            _soften(here, firsts[d], lasts[d])
            _add_up(here, values, kv * dim, tables[d], firsts[d], lasts[d], page_size, out[d, kv * share : (kv + 1) * share])


@compiled
def _latent(
    queries: _Array, latents: _Array, tables: _Array, firsts: _Array, lasts: _Array, page_size: int, out: _Array, first: int, last: int
) -> None:
    scores = np.empty((queries.shape[1], tables.shape[1] * page_size), np.float32)
    summed = np.empty((len(out), out.shape[2]), np.float32)
    for d in range(first, last):
        _score(latents.ctypes.data, latents.shape[1], queries[d], tables[d], lasts[d], page_size, scores)
        _soften(scores, firsts[d], lasts[d])
        _add_up(scores, latents, 0, tables[d], firsts[d], lasts[d], page_size, summed)
        for head in range(len(out)):
            out[head, d] = summed[head]


@_inner  # type: ignore[untyped-decorator]
def _score(keys: int, step: int, queries: _Array, table: _Array, last: int, page_size: int, scores: _Array) -> None:
    """Scores [Q, :last] of queries [Q, width] with the keys, `step` numbers apart, of the table's pages."""
    for page in range((last + page_size - 1) // page_size):
        rows = min(page_size, last - page * page_size)
        place = keys + 4 * table[page] * page_size * step
        target = scores.ctypes.data + 4 * page * page_size
        product(scores[0, :0], place, step, rows, queries.ctypes.data, len(queries), target, scores.shape[1], queries.shape[1])


@_inner  # type: ignore[untyped-decorator]
def _soften(scores: _Array, first: int, last: int) -> None:
    """Softmax of each row over [first, last)."""
    for q in range(len(scores)):
        row = scores[q, first:last]
        most = row.max()
        total = np.float32(0)
        for i in range(len(row)):
            row[i] = exp(row[i] - most)
            total += row[i]
        for i in range(len(row)):
            row[i] /= total


@_inner  # type: ignore[untyped-decorator]
def _add_up(weights: _Array, values: _Array, start: int, table: _Array, first: int, last: int, page_size: int, out: _Array) -> None:
    """Out [Q, n] = weights [Q, keys] times `n` of the values [slots, *] from `start` on, four slots of a page at a time."""
    out[:] = 0
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


@_inner  # type: ignore[untyped-decorator]
def _add_four(out: _Array, a: _Array, b: _Array, c: _Array, d: _Array, p: float, q: float, r: float, s: float) -> None:
    for n in range(len(out)):
        out[n] += p * a[n] + q * b[n] + r * c[n] + s * d[n]


@_inner  # type: ignore[untyped-decorator]
def _add_one(out: _Array, a: _Array, p: float) -> None:
    for n in range(len(out)):
        out[n] += p * a[n]
