"""SwiGLU's middle on a CPU, silu(gate) * up, in one pass: torch takes two, and one thread for both."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cpu_exp import exp
from model.cpu_parts import array_at, inner, job, take, word
from model.cpu_threads import Call, run

_Array = npt.NDArray[Any]
# Of a product take as long as one number of the result.
_OPERATIONS = 32


@functools.cache
def prepare() -> int:
    """The job, compiled: a second the first time on a machine and milliseconds after."""
    return job(_silu_times)


def silu_times(gate_up: Tensor) -> Tensor:
    """[*, I] of gate_up [*, 2 * I] float32, contiguous: silu of the first half of a row times the second."""
    assert gate_up.dtype == torch.float32, "from here on there are only addresses"
    assert gate_up.is_contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=torch.float32)
    num_rows = gate_up.numel() // max(2 * size, 1)
    run(Call(prepare(), (gate_up.data_ptr(), num_rows, size, out.data_ptr(), 0), 5, _OPERATIONS * out.numel(), num_rows), out)
    return out


def _silu_times(block: int) -> int:
    floats, num_rows, size, part = np.empty(0, np.float32), word(block, 2), word(block, 3), word(block, 5)
    gate_up = array_at(floats, word(block, 1), (num_rows, 2 * size))
    out = array_at(floats, word(block, 4), (num_rows, size))
    first = take(block, part)
    while first < num_rows:
        for row in range(first, min(first + part, num_rows)):
            silu_times_row(gate_up[row], out[row])
        first = take(block, part)
    return 1


@inner
def silu_times_row(gate_up: _Array, out: _Array) -> None:
    """For compiled code: out [I] of one row [2 * I]."""
    for i in range(len(out)):
        gate = gate_up[i]
        out[i] = gate / (np.float32(1) + exp(-gate)) * gate_up[len(out) + i]
