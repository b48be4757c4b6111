"""What a softmax is made of, in float32 for compiled loops: without calls, so that loops over it become vectors."""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(_context: Any, bits: Any) -> Any:
    """The float32 of the lowest 32 bits of an int64, which Numba makes of any arithmetic with integers."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(bits), generate


@njit(nogil=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e^x in float32 without a call, so that loops over it become vectors: x = n ln 2 + r, e^x = 2^n e^r by its series.

    Good to 2 units in the last place from -87 to 88, and what it is there beyond them.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts: the first times n is exact
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(0.5)
    series = series * r + np.float32(1)
    series = series * r + np.float32(1)
    return series * _as_float((np.int64(np.int32(n)) + 127) << 23)


@njit(nogil=True, fastmath={"reassoc", "nsz", "nnan"})  # type: ignore[untyped-decorator]
def highest_of(row: Any) -> Any:
    """The highest of some numbers, none of which is NaN; one at least. NumPy's own looks for NaN, one number after another."""
    highest = row[0]
    for n in range(len(row)):
        highest = max(highest, row[n])
    return highest
