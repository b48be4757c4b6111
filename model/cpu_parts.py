"""Compiled jobs of several threads: how one is called, reads what it is given, and takes part after part of the work.

A job is a C function of one address: that of a block of 8-byte words. The first word is the counter that its threads share, the others
are what the job knows as sizes, numbers and addresses. A thread that finds no core for a while holds up nothing but the part that it
has begun: the others take the rest.
"""

import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types
from numba.core import sigutils
from numba.extending import intrinsic

# A thread's share is cut into so many parts: few enough that taking one costs nothing beside it.
PARTS_OF_A_SHARE = 4
_WORD = ir.IntType(64)
_JOB = types.int64(types.intp)
# Sums may be reordered, but infinities and NaN keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}
# Compiles what other compiled code calls. A division is not looked at for a 0: a loop with such a look in it never becomes vectors.
inner: Callable[..., Any] = njit(nogil=True, fastmath=FASTMATH, error_model="numpy")


def part_of(number: int, num_shares: int, step: int = 1) -> int:
    """How many of a `number` of things, a multiple of `step`, to take at once where `num_shares` threads do."""
    if num_shares == 1:
        return max(number, 1)
    return max(1, -(-number // (PARTS_OF_A_SHARE * num_shares * step))) * step


def takers_of(number: int, part: int, num_shares: int) -> int:
    """How many of `num_shares` threads find a part of the `number` of things; the caller's own always counts."""
    return max(1, min(num_shares, -(-number // part)))


def job(function: Callable[[int], int], kind: str = "") -> int:
    """The address of function(block) -> 1 as machine code, which is kept on disk where there is a place for it.

    It answers 0 if it failed. The caller of a job keeps what its block names. Functions of one factory have a `kind` each: machine
    code is found by name.
    """
    function.__qualname__ += kind
    function.__name__ += kind
    try:
        code = cfunc(_JOB, cache=True)(function)
    except RuntimeError:
        # No directory to cache in (a read-only image without a home): every process compiles for itself.
        code = cfunc(_JOB)(function)
    _jobs.append(code)
    return int(code.address)


def compile_for(code: Any, signature: str) -> None:
    """Compiles for the types of a signature, and by those alone: machine code on disk is found by what it was asked for by.

    Who compiles it as a part of something else asks by types.
    """
    code.compile(sigutils.normalize_signature(signature)[0])


# Their machine code must stay.
_jobs: list[Any] = []


def bits(number: float) -> int:
    """The word of a block that `real` reads as this number."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


@intrinsic  # type: ignore[untyped-decorator]
def take(_context: Any, counter: Any, part: Any) -> Any:  # noqa: ARG001  # the types of what compiled code gives
    """For compiled code: the first thing of the part that is now the caller's. `counter` is the address of an int64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, arguments[0], _WORD), arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _word(_context: Any, _address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_place(builder, arguments[0], _WORD))

    return types.int64(types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _real(_context: Any, _address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_place(builder, arguments[0], ir.DoubleType()))

    return types.float64(types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, like: Any, _address: Any) -> Any:
    """The address as one of `like`'s elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(like, types.intp), generate


@njit  # type: ignore[untyped-decorator]
def word(block: int, place: int) -> int:
    """For compiled code: word `place` of a block."""
    return _word(block + 8 * place)  # type: ignore[no-any-return]


@njit  # type: ignore[untyped-decorator]
def real(block: int, place: int) -> float:
    """For compiled code: word `place` of a block, as `bits` made it."""
    return _real(block + 8 * place)  # type: ignore[no-any-return]


@njit  # type: ignore[untyped-decorator]
def array_at(like: Any, address: int, shape: Any) -> Any:
    """For compiled code: the contiguous array of `like`'s elements that begins at an address."""
    return carray(_pointer(like, address), shape)


@inner
def keep(*_arrays: Any) -> None:
    """They live at least until here: compiled code lets go of an array after its last use, and an address is none."""


def _place(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())
