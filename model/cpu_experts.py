"""Routed experts of a few tokens each on a CPU: one pass over the weights as they are stored, arithmetic in float32.

A decode step gives an activated expert a handful of tokens, so its cost is reading its weights. `torch` reads them slower than
the memory delivers them when there are few rows, and has bfloat16 and float16 copied to float32 first; this kernel takes two
rows of the weight at a time past up to four tokens at once, and widens in registers, which is exact.

Importing this module imports Numba, which takes a while: only a process that holds experts on a CPU does it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
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
MISSING = -1


@functools.cache
def prepare(dtype: torch.dtype) -> None:
    """Compiles for a storage type, seconds the first time on a machine and milliseconds after, so that no request waits for it."""
    layer = LayerTable({0: (torch.zeros((2, 2), dtype=dtype), torch.zeros((2, 1), dtype=dtype))})
    hidden, ids, weights = np.zeros((1, 2), np.float32), np.zeros((1, 1), np.int16), np.zeros((1, 1), np.float32)
    with ThreadPoolExecutor(1) as helpers:
        for num_threads in (1, 2):
            layer.run(hidden, ids, weights, np.zeros_like(hidden), 1, num_threads, helpers)


class LayerTable:
    """The experts of one layer, by where their weights lie. Holds the tensors, so the addresses stay good as long as it lives.

    experts: (gate_up [2 * I, H], down [H, I]) by id, contiguous, of one storage type and one shape, on the CPU.
    """

    def __init__(self, experts: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        gate_up, down = next(iter(experts.values()))
        self._weights = dict(experts)
        self.inner = down.shape[1]
        self.like = np.empty(0, dtype=_CARRIERS[gate_up.dtype])
        self.gate_up = np.zeros(max(experts) + 1, dtype=np.int64)
        self.down = np.zeros_like(self.gate_up)
        for expert, (first, second) in experts.items():
            self.gate_up[expert], self.down[expert] = first.data_ptr(), second.data_ptr()

    def run(
        self,
        hidden: _Array,
        expert_ids: _Array,
        weights: _Array,
        partial: _Array,
        max_group: int,
        num_threads: int = 1,
        helpers: Executor | None = None,
        *,
        is_whole: bool = False,
    ) -> int:
        """Adds to partial [T, H] the weighted experts of hidden [T, H] that at most `max_group` tokens chose.

        expert_ids [T, K] int16, -1 for nobody; hidden, weights [T, K] and partial float32; all contiguous. Returns how many choices
        are of experts with more tokens, and so are still to be done; where the whole was asked for, nothing is computed then.
        MISSING, and nothing is computed, if an id is not held. `helpers` runs num_threads - 1 of the shares.
        """
        if num_threads == 1:
            num_left: int = _run_alone(
                self.like, self.gate_up, self.down, self.inner, expert_ids, hidden, weights, partial, max_group, is_whole
            )
            return num_left
        num_left, experts, starts, choices = _group(self.gate_up, expert_ids, max_group)
        if not len(experts) or (is_whole and num_left):
            return num_left
        assert helpers
        top_k = expert_ids.shape[1]
        activations = np.empty((len(choices), 2 * self.inner), dtype=np.float32)
        outputs = np.empty((len(choices), hidden.shape[1]), dtype=np.float32)
        grouped = hidden[choices // top_k]

        def share(first: int, last: int) -> None:
            _run_share(self.like, self.gate_up, self.down, experts, starts, first, last, grouped, activations, outputs)

        bounds = split(np.diff(starts), num_threads)
        others = [helpers.submit(share, *bound) for bound in bounds[1:]]
        share(*bounds[0])
        for other in others:
            other.result()
        _accumulate(outputs, choices, top_k, weights, partial)
        return num_left


def split(counts: Iterable[int], num_shares: int) -> list[tuple[int, int]]:
    """Contiguous shares [first, last) of the experts, about equally dear: reading one costs as much as four tokens' arithmetic."""
    costs = np.cumsum([4 + count for count in counts])
    cuts = np.searchsorted(costs, costs[-1] * np.arange(1, num_shares) / num_shares, side="left") + 1
    edges = [0, *np.minimum(cuts, len(costs)).tolist(), len(costs)]
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
def _group(gate_up: _Array, ids: _Array, max_group: int) -> Any:
    """Counting sort of ids [T, K]: (choices left to others or MISSING, experts [A], starts [A + 1], their choices [N] in [T * K])."""
    counts = np.zeros(len(gate_up) + 1, np.int64)
    num_tokens, top_k = ids.shape
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids[t, k]
            if expert != -1:
                if expert < 0 or expert >= len(gate_up) or gate_up[expert] == 0:
                    return MISSING, counts[:0], counts[:0], counts[:0]
                counts[expert] += 1
    num_activated = num_left = num_taken = 0
    for expert in range(len(gate_up)):
        if counts[expert] > max_group:
            num_left += counts[expert]
        elif counts[expert]:
            num_activated += 1
            num_taken += counts[expert]
    experts, starts = np.empty(num_activated, np.int64), np.zeros(num_activated + 1, np.int64)
    place = np.full(len(gate_up), -1, np.int64)
    a = 0
    for expert in range(len(gate_up)):
        if 0 < counts[expert] <= max_group:
            experts[a], place[expert] = expert, starts[a]
            starts[a + 1] = starts[a] + counts[expert]
            a += 1
    choices = np.empty(num_taken, np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids[t, k]
            if expert >= 0 and place[expert] >= 0:
                choices[place[expert]] = t * top_k + k
                place[expert] += 1
    return num_left, experts, starts, choices


@compiled
def _run_share(
    like: _Array,
    gate_up: _Array,
    down: _Array,
    experts: _Array,
    starts: _Array,
    first: int,
    last: int,
    inputs: _Array,
    activations: _Array,
    outputs: _Array,
) -> None:
    hidden_size, inner = inputs.shape[1], activations.shape[1] // 2
    for a in range(first, last):
        x = inputs[starts[a] : starts[a + 1]]
        gate_and_up = activations[starts[a] : starts[a + 1]]
        y = outputs[starts[a] : starts[a + 1]]
        matrix = carray(_pointer(gate_up[experts[a]], like), (2 * inner, hidden_size))
        for row in range(inner):
            _two_rows(matrix, row, inner + row, x, gate_and_up)
        product = np.empty((len(x), inner), np.float32)
        for t in range(len(x)):
            for i in range(inner):
                gate = gate_and_up[t, i]
                product[t, i] = gate / (np.float32(1) + np.exp(-gate)) * gate_and_up[t, inner + i]
        matrix = carray(_pointer(down[experts[a]], like), (hidden_size, inner))
        for row in range(0, hidden_size, 2):
            _two_rows(matrix, row, min(row + 1, hidden_size - 1), product, y)


@compiled
def _accumulate(outputs: _Array, choices: _Array, top_k: int, weights: _Array, partial: _Array) -> None:
    for n in range(len(choices)):
        t = choices[n] // top_k
        target, output, weight = partial[t], outputs[n], weights[t, choices[n] % top_k]
        for h in range(len(target)):
            target[h] += weight * output[h]


@compiled
def _run_alone(
    like: _Array,
    gate_up: _Array,
    down: _Array,
    inner: int,
    ids: _Array,
    hidden: _Array,
    weights: _Array,
    partial: _Array,
    max_group: int,
    is_whole: bool,
) -> Any:
    """All of it in one call, for a decode step of few tokens, where every call from Python costs as much as an expert's row."""
    num_left, experts, starts, choices = _group(gate_up, ids, max_group)
    if not len(experts) or (is_whole and num_left):
        return num_left
    top_k = ids.shape[1]
    inputs = np.empty((len(choices), hidden.shape[1]), np.float32)
    for n in range(len(choices)):
        inputs[n] = hidden[choices[n] // top_k]
    activations = np.empty((len(choices), 2 * inner), np.float32)
    outputs = np.empty_like(inputs)
    _run_share(like, gate_up, down, experts, starts, 0, len(experts), inputs, activations, outputs)
    _accumulate(outputs, choices, top_k, weights, partial)
    return num_left
