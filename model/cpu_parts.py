"""Parts of work that threads take, one after another, off a counter that they share.

A thread that finds no core for a while holds up nothing but the part that it has begun: the others take the rest.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

# A thread's share is cut into so many parts: few enough that taking one costs nothing beside it.
_PARTS_OF_A_SHARE = 4


def part_of(number: int, num_shares: int, step: int = 1) -> int:
    """How many of a `number` of things, a multiple of `step`, to take at once where `num_shares` threads do."""
    if num_shares == 1:
        return max(number, 1)
    return max(1, -(-number // (_PARTS_OF_A_SHARE * num_shares * step))) * step


@intrinsic  # type: ignore[untyped-decorator]
def take(_context: Any, counter: Any, part: Any) -> Any:  # noqa: ARG001  # the types of what compiled code gives
    """For compiled code: the first thing of the part that is now the caller's. `counter` is the address of an int64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate
