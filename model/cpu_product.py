"""Products of tokens with weights as they are stored, for a CPU: y = x W^T, W [N, K] in float32, bfloat16 or float16.

A decode step gives a matrix a handful of tokens, so its cost is reading it: every row is read from memory once, and a half-width
weight is widened in registers, which is exact. Nothing is packed: rows are read in the order in which the checkpoint has them.

Importing this module imports Numba, which takes a while: only a process that computes on a CPU does it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from model.cpu_parts import FASTMATH, inner, job, take, word
from model.cpu_threads import Call, run
from model.cpu_tile import NUM_ROWS, NUM_TOKENS, make_tile

# The numpy type that carries a storage type's bits: numpy knows no bfloat16, and Numba no float16 on a CPU.
CARRIERS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
# An array of each, for compiled code to know the element by.
LIKE = {dtype: np.empty(0, carrier) for dtype, carrier in CARRIERS.items()}
# Arithmetic for so many tokens takes as long as reading the weight, and goes on meanwhile.
TOKENS_READ = 6
# Bytes of tokens that are gone through before the next rows of the weight are: they stay in a core's own cache.
_BLOCK_BYTES = 256 << 10
_Array = npt.NDArray[Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles on first call, and keeps the machine code on disk where there is a place for it."""
    try:
        return njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        # No directory to cache in (a read-only image without a home): every process compiles for itself.
        return inner(function)  # type: ignore[no-any-return]


@functools.cache
def prepare(dtype: torch.dtype) -> int:
    """The job for a storage type, compiled: seconds the first time on a machine and milliseconds after."""
    return job_of(_linear_of, dtype)


def job_of(make: Callable[[_Array], Callable[[int], int]], dtype: torch.dtype) -> int:
    """The job that `make` makes of an array like those of a storage type."""
    return job(make(LIKE[dtype]), str(dtype).replace("torch.", "_"))


def aligned(weight: Tensor) -> Tensor:
    """The weight, contiguous, as vectors are read best; a copy where it is not (a file's tensors begin anywhere)."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 64 == 0 else weight.clone()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[*, N] float32 of x [*, K] float32 and weight [N, K], contiguous, of a type in CARRIERS."""
    num_rows, length = weight.shape
    assert x.shape[-1] == length, "from here on there are only addresses"
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert weight.is_contiguous()
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], num_rows), dtype=torch.float32)
    num_tokens = x.numel() // max(length, 1)
    words = (weight.data_ptr(), num_rows, x.data_ptr(), num_tokens, y.data_ptr(), length, 0)
    run(Call(prepare(weight.dtype), words, 7, num_rows * length * (num_tokens + TOKENS_READ), num_rows, NUM_ROWS), y)
    return y


_full_6, _full_5, _full_4, _full_3, _full_2, _full_1 = (make_tile(NUM_ROWS, tokens) for tokens in (6, 5, 4, 3, 2, 1))
_one = make_tile(1, 1)


@inner
def product(like: _Array, weight: int, weight_step: int, num_rows: int, x: int, num_tokens: int, y: int, y_step: int, length: int) -> None:
    """Y [T, N] = x [T, K] weight [N, K]^T by their addresses; rows of the weight and of y lie `weight_step` and `y_step` numbers apart."""
    num_blocks = max(1, (4 * num_tokens * length + _BLOCK_BYTES - 1) // _BLOCK_BYTES)
    block = max(1, (num_tokens + num_blocks * NUM_TOKENS - 1) // (num_blocks * NUM_TOKENS)) * NUM_TOKENS
    for first in range(0, num_tokens, block):
        _block(
            like,
            weight,
            weight_step,
            num_rows,
            x + 4 * first * length,
            min(block, num_tokens - first),
            y + 4 * first * y_step,
            y_step,
            length,
        )


@inner
def _block(like: _Array, weight: int, step: int, num_rows: int, x: int, num_tokens: int, y: int, y_step: int, length: int) -> None:
    row_bytes = step * like.itemsize
    num_whole = num_rows - num_rows % NUM_ROWS
    for row in range(0, num_whole, NUM_ROWS):
        rows, place = weight + row * row_bytes, y + 4 * row
        token = 0
        while token + 6 <= num_tokens:
            _full_6(like, rows, step, x + 4 * token * length, length, place + 4 * token * y_step, y_step, length)
            token += 6
        left, place = num_tokens - token, place + 4 * token * y_step
        if left == 5:
            _full_5(like, rows, step, x + 4 * token * length, length, place, y_step, length)
        elif left == 4:
            _full_4(like, rows, step, x + 4 * token * length, length, place, y_step, length)
        elif left == 3:
            _full_3(like, rows, step, x + 4 * token * length, length, place, y_step, length)
        elif left == 2:
            _full_2(like, rows, step, x + 4 * token * length, length, place, y_step, length)
        elif left == 1:
            _full_1(like, rows, step, x + 4 * token * length, length, place, y_step, length)
    for row in range(num_whole, num_rows):
        for token in range(num_tokens):
            _one(like, weight + row * row_bytes, step, x + 4 * token * length, length, y + 4 * (token * y_step + row), y_step, length)


def _linear_of(like: _Array) -> Callable[[int], int]:
    size = like.itemsize

    def linear(block: int) -> int:
        weight, num_rows, x, num_tokens = word(block, 1), word(block, 2), word(block, 3), word(block, 4)
        y, length, part = word(block, 5), word(block, 6), word(block, 7)
        first = take(block, part)
        while first < num_rows:
            rows, place = weight + first * length * size, y + 4 * first
            product(like, rows, length, min(part, num_rows - first), x, num_tokens, place, num_rows, length)
            first = take(block, part)
        return 1

    return linear
