"""Routed experts on a CPU: one pass over the weights as they are stored, arithmetic in float32.

A call groups its tokens by expert and takes one expert after another through both products (`model.cpu_product`), everything between
them in a core's cache. It serves a decode step's handful of tokens and a prefill's hundreds.

Importing this module imports Numba, which takes a while: only a process that holds experts on a CPU does it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cpu_crew import lead
from model.cpu_in_place import HIDDEN_SIZE, OWN
from model.cpu_parts import array_at, inner, keep, take, word
from model.cpu_product import TOKENS_READ, compiled, job_of, product
from model.cpu_silu import silu_times_row
from model.cpu_threads import crew_of, run_alone

# What a layer's job answers; 0 where it failed.
_DONE, _NOT_HELD = 1, 2
_Array = npt.NDArray[Any]


@functools.cache
def prepare(dtype: torch.dtype) -> None:
    """Compiles for a storage type, seconds the first time on a machine and milliseconds after, so that no request waits for it."""
    layer = LayerTable({0: (torch.zeros((2, 2), dtype=dtype), torch.zeros((2, 1), dtype=dtype))})
    hidden, ids, weights = np.zeros((1, 2), np.float32), np.zeros((1, 1), np.int16), np.zeros((1, 1), np.float32)
    layer.run(hidden, ids, weights, np.zeros_like(hidden))


class LayerTable:
    """The experts of one layer, by where their weights lie. Holds the tensors, so the addresses stay good as long as it lives.

    experts: (gate_up [2 * I, H], down [H, I]) by id, contiguous, of one storage type and one shape, on the CPU.
    """

    def __init__(self, experts: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        gate_up, down = next(iter(experts.values()))
        self._weights = dict(experts)
        self._hidden_size = gate_up.shape[1]
        self._gate_up = np.zeros(max(experts) + 1, dtype=np.int64)
        self._down = np.zeros_like(self._gate_up)
        for expert, (first, second) in experts.items():
            self._gate_up[expert], self._down[expert] = first.data_ptr(), second.data_ptr()
        self._job = _layer_job(gate_up.dtype)
        expert_bytes = gate_up.nbytes + down.nbytes
        places = self._gate_up.ctypes.data, self._down.ctypes.data, len(self._gate_up)
        self.record = np.array(
            (self._job, self._hidden_size, expert_bytes, len(experts), TOKENS_READ, *places, down.shape[1], _share_job(gate_up.dtype)),
            dtype=np.int64,
        )

    def run(self, hidden: _Array, expert_ids: _Array, weights: _Array, partial: _Array, num_threads: int = 1) -> bool:
        """Adds to partial [T, H] the weighted experts of hidden [T, H]; whether it could.

        expert_ids [T, K] int16, -1 for nobody; hidden, weights [T, K] and partial float32; all contiguous. False, and nothing is
        computed, if an id is not held.
        """
        arrays = (hidden, expert_ids, weights, partial)
        assert all(array.flags.c_contiguous for array in arrays), "from here on there are only addresses"
        assert hidden.dtype == weights.dtype == partial.dtype == np.float32
        assert expert_ids.dtype == np.int16
        assert hidden.shape[1] == self._hidden_size
        assert hidden.shape == partial.shape
        assert expert_ids.shape == weights.shape
        assert len(expert_ids) == len(hidden)
        addresses = (array.ctypes.data for array in arrays)
        return run_alone(self._job, (*addresses, *expert_ids.shape, self.record.ctypes.data, *crew_of(num_threads))) == _DONE


@compiled
def _group(gate_up: _Array, ids: _Array) -> Any:
    """Counting sort of ids [T, K]: (whether all are held, experts [A], starts [A + 1], their choices [N] in [T * K])."""
    counts = np.zeros(len(gate_up), np.int64)
    num_tokens, top_k = ids.shape
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids[t, k]
            if expert != -1:
                if expert < 0 or expert >= len(gate_up) or gate_up[expert] == 0:
                    return False, counts[:0], counts[:0], counts[:0]
                counts[expert] += 1
    num_activated = np.count_nonzero(counts)
    experts, starts = np.empty(num_activated, np.int64), np.zeros(num_activated + 1, np.int64)
    place = np.zeros(len(gate_up), np.int64)
    a = 0
    for expert in range(len(gate_up)):
        if counts[expert]:
            experts[a], place[expert] = expert, starts[a]
            starts[a + 1] = starts[a] + counts[expert]
            a += 1
    choices = np.empty(starts[num_activated], np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids[t, k]
            if expert >= 0:
                choices[place[expert]] = t * top_k + k
                place[expert] += 1
    return True, experts, starts, choices


def _run_of(like: _Array) -> Callable[[int], int]:
    """Outputs [N, H] of the choices of the experts that a thread takes, one after another."""

    def run(block: int) -> int:
        ints, floats = np.empty(0, np.int64), np.empty(0, np.float32)
        num_held, num_experts, num_choices, num_tokens = word(block, 8), word(block, 9), word(block, 10), word(block, 11)
        size, inner, top_k = word(block, 12), word(block, 13), word(block, 14)
        gate_up, down = array_at(ints, word(block, 1), (num_held,)), array_at(ints, word(block, 2), (num_held,))
        experts, starts = array_at(ints, word(block, 3), (num_experts,)), array_at(ints, word(block, 4), (num_experts + 1,))
        choices, hidden = array_at(ints, word(block, 5), (num_choices,)), array_at(floats, word(block, 6), (num_tokens, size))
        outputs = array_at(floats, word(block, 7), (num_choices, size))
        most = np.diff(starts).max()
        inputs, gated, products = (
            np.empty((most, size), np.float32),
            np.empty((most, 2 * inner), np.float32),
            np.empty((most, inner), np.float32),
        )
        a = take(block, 1)
        while a < num_experts:
            first, last, expert = starts[a], starts[a + 1], experts[a]
            mine, place = choices[first:last], outputs[first:last]
            _expert(like, gate_up[expert], down[expert], mine, hidden, top_k, inputs, gated, products, place)
            a = take(block, 1)
        return 1

    return run


@functools.cache
def _layer_job(dtype: torch.dtype) -> int:
    return job_of(_layer_of, dtype)


@functools.cache
def _share_job(dtype: torch.dtype) -> int:
    return job_of(_run_of, dtype)


def _layer_of(like: _Array) -> Callable[[int], int]:
    """All of a layer in one call; `model.cpu_in_place` has the block's words."""

    def layer(block: int) -> int:
        ints, floats = np.empty(0, np.int64), np.empty(0, np.float32)
        num_tokens, top_k, record = word(block, 5), word(block, 6), word(block, 7)
        size, held = word(record, HIDDEN_SIZE), word(record, OWN + 2)
        gate_up, down, inner = (
            array_at(ints, word(record, OWN), (held,)),
            array_at(ints, word(record, OWN + 1), (held,)),
            word(record, OWN + 3),
        )
        hidden, partial = array_at(floats, word(block, 1), (num_tokens, size)), array_at(floats, word(block, 4), (num_tokens, size))
        ids = array_at(np.empty(0, np.int16), word(block, 2), (num_tokens, top_k))
        weights = array_at(floats, word(block, 3), (num_tokens, top_k))
        is_held, experts, starts, choices = _group(gate_up, ids)
        if not is_held:
            return _NOT_HELD
        if len(experts) == 0:
            return _DONE
        num_helpers = min(word(block, 9), len(experts) - 1)
        if num_helpers > 0:
            outputs, shared = np.empty((len(choices), size), np.float32), np.zeros(16, np.int64)
            shared[1], shared[2], shared[8] = gate_up.ctypes.data, down.ctypes.data, held
            shared[3], shared[4], shared[5] = experts.ctypes.data, starts.ctypes.data, choices.ctypes.data
            shared[6], shared[7] = word(block, 1), outputs.ctypes.data
            shared[9], shared[10], shared[11] = len(experts), len(choices), num_tokens
            shared[12], shared[13], shared[14] = size, inner, top_k
            failed = lead(word(block, 8), num_helpers, word(record, OWN + 4), shared.ctypes.data)
            keep(shared, experts, starts, choices, outputs)
            if failed:
                return 0
            _accumulate(outputs, choices, top_k, weights, partial)
            return _DONE
        most = np.diff(starts).max()
        inputs, gated, products = (
            np.empty((most, size), np.float32),
            np.empty((most, 2 * inner), np.float32),
            np.empty((most, inner), np.float32),
        )
        outputs = np.empty((most, size), np.float32)
        for a in range(len(experts)):
            mine = choices[starts[a] : starts[a + 1]]
            _expert(like, gate_up[experts[a]], down[experts[a]], mine, hidden, top_k, inputs, gated, products, outputs)
            _accumulate(outputs, mine, top_k, weights, partial)
        return _DONE

    return layer


@inner
def _expert(
    like: _Array,
    gate_up: int,
    down: int,
    choices: _Array,
    hidden: _Array,
    top_k: int,
    inputs: _Array,
    gated: _Array,
    products: _Array,
    outputs: _Array,
) -> None:
    """Outputs [n, H] = down(silu(gate x) * up x) of the tokens that made the choices; the other arrays are room to work in."""
    size, inner, num = hidden.shape[1], products.shape[1], len(choices)
    for n in range(num):
        inputs[n] = hidden[choices[n] // top_k]
    product(like, gate_up, size, 2 * inner, inputs.ctypes.data, num, gated.ctypes.data, 2 * inner, size)
    for n in range(num):
        silu_times_row(gated[n], products[n])
    product(like, down, inner, size, products.ctypes.data, num, outputs.ctypes.data, size, inner)


@inner
def _accumulate_one(output: _Array, weight: float, target: _Array) -> None:
    for h in range(len(target)):
        target[h] += weight * output[h]


@compiled
def _accumulate(outputs: _Array, choices: _Array, top_k: int, weights: _Array, partial: _Array) -> None:
    for n in range(len(choices)):
        token = choices[n] // top_k
        _accumulate_one(outputs[n], weights[token, choices[n] % top_k], partial[token])
