"""Routed experts of a few tokens each on a CPU: one pass over the weights as they are stored, arithmetic in float32.

A decode step gives an activated expert a handful of tokens, so its cost is reading its weights. `torch` reads them slower than
the memory delivers them when there are few rows, and has bfloat16 and float16 copied to float32 first; this kernel takes two
rows of the weight at a time past up to four tokens at once, and widens in registers, which is exact.

Importing this module imports Numba, which takes a while: only a process that holds experts on a CPU does it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

# The numpy type that carries a storage type's bits: numpy knows no bfloat16, and Numba no float16 on a CPU.
_CARRIERS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
# Sums may be reordered (that is what makes them vectors), but infinities and NaN keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}
_Array = npt.NDArray[Any]


@functools.cache
def prepare(dtype: torch.dtype) -> None:
    """Compiles for a storage type, seconds the first time on a machine and milliseconds after, so that no request waits for it."""
    gate_up, down = torch.zeros((2, 2), dtype=dtype), torch.zeros((2, 1), dtype=dtype)
    run([(gate_up, down)], [1], torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, 2), 1, None)


def run(
    experts: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
    hidden: Tensor,
    rows: Tensor,
    weights: Tensor,
    partial: Tensor,
    num_threads: int,
    helpers: Executor | None,
) -> None:
    """Adds weights[n] * expert(hidden[n]) to partial[rows[n]] for N choices that are grouped by expert.

    experts: (gate_up [2 * I, H], down [H, I]) of the A activated, contiguous, of one storage type; counts: their choices, N in
    all; hidden [N, H], weights [N] and partial [T, H] float32. `helpers` runs num_threads - 1 of the shares.
    """
    assert helpers or num_threads == 1
    inner = experts[0][1].shape[1]
    gate_up = np.array([expert[0].data_ptr() for expert in experts], dtype=np.int64)
    down = np.array([expert[1].data_ptr() for expert in experts], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    inputs, outputs = hidden.numpy(), np.empty(hidden.shape, dtype=np.float32)
    activations = np.empty((len(inputs), 2 * inner), dtype=np.float32)
    like = np.empty(0, dtype=_CARRIERS[experts[0][0].dtype])

    def share(first: int, last: int) -> None:
        _run_share(like, gate_up, down, starts, first, last, inputs, activations, outputs)

    bounds = split(counts, num_threads)
    others = [helpers.submit(share, *bound) for bound in bounds[1:]] if helpers else []
    share(*bounds[0])
    for other in others:
        other.result()
    _accumulate(outputs, rows.numpy(), weights.numpy(), partial.numpy())


def split(counts: Sequence[int], num_shares: int) -> list[tuple[int, int]]:
    """Contiguous shares [first, last) of the experts, about equally dear: reading one costs as much as four tokens' arithmetic."""
    if num_shares == 1:
        return [(0, len(counts))] if counts else []
    costs = np.cumsum([4 + count for count in counts])
    cuts = np.searchsorted(costs, costs[-1] * np.arange(1, num_shares) / num_shares, side="left") + 1
    edges = [0, *np.minimum(cuts, len(counts)).tolist(), len(counts)]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles on first call, and keeps the machine code on disk where there is a place for it."""
    try:
        return njit(nogil=True, fastmath=_FASTMATH, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        # No directory to cache in (a read-only image without a home): every process compiles for itself.
        return njit(nogil=True, fastmath=_FASTMATH)(function)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to like's element type."""
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def _widen(_context: Any, value: Any) -> Any:
    """float32 of a stored number: itself, bfloat16 bits (uint16) or float16 bits (int16)."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = arguments[0]
        if value == types.uint16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(value), generate


_inner = njit(nogil=True, fastmath=_FASTMATH)


@_inner  # type: ignore[untyped-decorator]
def _dot_1(a: _Array, b: _Array, x0: _Array) -> Any:
    a0 = b0 = np.float32(0)
    for k in range(len(a)):
        a0 += _widen(a[k]) * x0[k]
        b0 += _widen(b[k]) * x0[k]
    return a0, b0


@_inner  # type: ignore[untyped-decorator]
def _dot_2(a: _Array, b: _Array, x0: _Array, x1: _Array) -> Any:
    a0 = a1 = b0 = b1 = np.float32(0)
    for k in range(len(a)):
        u, v = _widen(a[k]), _widen(b[k])
        a0 += u * x0[k]
        a1 += u * x1[k]
        b0 += v * x0[k]
        b1 += v * x1[k]
    return a0, a1, b0, b1


@_inner  # type: ignore[untyped-decorator]
def _dot_4(a: _Array, b: _Array, x0: _Array, x1: _Array, x2: _Array, x3: _Array) -> Any:
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for k in range(len(a)):
        u, v = _widen(a[k]), _widen(b[k])
        a0 += u * x0[k]
        a1 += u * x1[k]
        a2 += u * x2[k]
        a3 += u * x3[k]
        b0 += v * x0[k]
        b1 += v * x1[k]
        b2 += v * x2[k]
        b3 += v * x3[k]
    return a0, a1, a2, a3, b0, b1, b2, b3


@_inner  # type: ignore[untyped-decorator]
def _two_rows(matrix: _Array, r: int, s: int, x: _Array, y: _Array) -> None:
    """y[:, r] and y[:, s] = x @ matrix[r] and x @ matrix[s]: each row is read from memory once, whatever the number of tokens."""
    a, b = matrix[r], matrix[s]
    num_tokens = len(x)
    t = 0
    while t + 4 <= num_tokens:
        (y[t, r], y[t + 1, r], y[t + 2, r], y[t + 3, r], y[t, s], y[t + 1, s], y[t + 2, s], y[t + 3, s]) = _dot_4(
            a, b, x[t], x[t + 1], x[t + 2], x[t + 3]
        )
        t += 4
    if t + 2 <= num_tokens:
        y[t, r], y[t + 1, r], y[t, s], y[t + 1, s] = _dot_2(a, b, x[t], x[t + 1])
        t += 2
    if t < num_tokens:
        y[t, r], y[t, s] = _dot_1(a, b, x[t])


@compiled
def _run_share(
    like: _Array,
    gate_up: _Array,
    down: _Array,
    starts: _Array,
    first: int,
    last: int,
    inputs: _Array,
    activations: _Array,
    outputs: _Array,
) -> None:
    hidden_size, inner = inputs.shape[1], activations.shape[1] // 2
    for expert in range(first, last):
        x = inputs[starts[expert] : starts[expert + 1]]
        gate_and_up = activations[starts[expert] : starts[expert + 1]]
        y = outputs[starts[expert] : starts[expert + 1]]
        matrix = carray(_pointer(gate_up[expert], like), (2 * inner, hidden_size))
        for row in range(inner):
            _two_rows(matrix, row, inner + row, x, gate_and_up)
        product = np.empty((len(x), inner), np.float32)
        for t in range(len(x)):
            for i in range(inner):
                gate = gate_and_up[t, i]
                product[t, i] = gate / (np.float32(1) + np.exp(-gate)) * gate_and_up[t, inner + i]
        matrix = carray(_pointer(down[expert], like), (hidden_size, inner))
        for row in range(0, hidden_size, 2):
            _two_rows(matrix, row, min(row + 1, hidden_size - 1), product, y)


@compiled
def _accumulate(outputs: _Array, rows: _Array, weights: _Array, partial: _Array) -> None:
    for n in range(len(rows)):
        target, output, weight = partial[rows[n]], outputs[n], weights[n]
        for h in range(len(target)):
            target[h] += weight * output[h]
