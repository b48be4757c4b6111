"""How threads of one process do a job together, as machine code: no interpreter's lock, and no sleep where the next job comes soon.

A crew is a table of words, each on a cache line of its own: what the job is, whether it is open, who is inside. The leader, any thread
of Python, puts a job there, does it with whoever joins, closes it, and waits for those inside. A helper that has found no job for a
while parks: it sleeps in `read` until the leader writes to its descriptor.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from model.cpu_parts import compile_for, take
from model.cpu_product import compiled

# Places in the table.
_LED, _OPEN, _JOBS, _FUNCTION, _BLOCK, _INSIDE, _FAILED, _ONE, _REST, _HELPERS = range(10)
_LINE = 64  # bytes
# Looks at the table before a helper parks, each as long as the CPU's own pause: some 100 us.
_MOST_LOOKS = 10_000
# Looks at those inside before the leader lets others have its core.
_LOOKS_ALONE = 500

_WORD = ir.IntType(64)
_libc_read = types.ExternalFunction("read", types.intp(types.int32, types.intp, types.intp))
_libc_write = types.ExternalFunction("write", types.intp(types.int32, types.intp, types.intp))
libc_yield = types.ExternalFunction("sched_yield", types.int32())


def prepare() -> None:
    """Compiles, seconds the first time on a machine and milliseconds after."""
    code: Any
    for code, signature in ((lead, "int64(int64, int64, int64, int64)"), (help_crew, "void(int64, int64, int64)")):
        compile_for(code, signature)


def new_table(max_helpers: int) -> npt.NDArray[np.int64]:
    """A crew without helpers, with room for so many. It stays: helpers look at it for as long as the process lives."""
    table = np.zeros((_HELPERS + max_helpers) * _LINE // 8, np.int64)
    table[_ONE * _LINE // 8] = 1
    _tables.append(table)
    return table


def rest_of(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[1], a view: not 0 tells helpers that wait to park."""
    place = _REST * _LINE // 8
    return table[place : place + 1]


def parked_of(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A view of a word of each helper: not 0 where it sleeps."""
    return table[_HELPERS * _LINE // 8 :: _LINE // 8]


_tables: list[npt.NDArray[np.int64]] = []


def _atomic(generate: Callable[[Any, Any, Any], Any], num_words: int) -> Any:
    """An intrinsic of an address and, for two, a word."""

    def of(builder: Any, arguments: Any) -> Any:
        return generate(builder, builder.inttoptr(arguments[0], _WORD.as_pointer()), arguments[-1])

    if num_words == 1:

        @intrinsic  # type: ignore[untyped-decorator]
        def one(_context: Any, _address: Any) -> Any:
            return types.int64(types.intp), lambda _target, builder, _signature, arguments: of(builder, arguments)

        return one

    @intrinsic  # type: ignore[untyped-decorator]
    def two(_context: Any, _address: Any, _value: Any) -> Any:
        return types.int64(types.intp, types.int64), lambda _target, builder, _signature, arguments: of(builder, arguments)

    return two


load = _atomic(lambda builder, place, _: builder.load_atomic(place, "seq_cst", 8), 1)
swap = _atomic(lambda builder, place, value: builder.atomic_rmw("xchg", place, value, "seq_cst"), 2)


@intrinsic  # type: ignore[untyped-decorator]
def pause(_context: Any) -> Any:
    """Tells the core that this is a loop that waits."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        machine, kind = builder.module.triple.partition("-")[0], ir.FunctionType(ir.VoidType(), [])
        if machine == "x86_64":
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])
        elif machine == "aarch64":
            hint = builder.module.declare_intrinsic("llvm.aarch64.hint", (), ir.FunctionType(ir.VoidType(), [ir.IntType(32)]))
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])
        return _WORD(0)

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def call(_context: Any, _function: Any, _block: Any) -> Any:
    """What the job at an address answers."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.intp, types.intp), generate


@compiled
def num_awake(crew: int, num_helpers: int) -> int:
    """Of so many helpers those that look for jobs; none once they have been told to rest."""
    if load(crew + _LINE * _REST):
        return 0
    awake = 0
    for helper in range(num_helpers):
        awake += load(crew + _LINE * (_HELPERS + helper)) == 0
    return awake


@compiled
def lead(crew: int, num_helpers: int, function: int, block: int) -> int:
    """Does a job with the helpers that are awake, and with the first `num_helpers` woken for it; how many threads failed in it.

    Whoever finds the crew led by another thread does the job alone.
    """
    if num_helpers == 0 or swap(crew + _LINE * _LED, 1):
        return 1 - call(function, block)  # type: ignore[no-any-return]
    number = load(crew + _LINE * _JOBS) + 1
    swap(crew + _LINE * _JOBS, number)
    swap(crew + _LINE * _FUNCTION, function)
    swap(crew + _LINE * _BLOCK, block)
    swap(crew + _LINE * _FAILED, 0)
    swap(crew + _LINE * _REST, 0)
    swap(crew + _LINE * _OPEN, number)
    for helper in range(num_helpers):
        descriptor = swap(crew + _LINE * (_HELPERS + helper), 0)
        if descriptor:
            _libc_write(np.int32(descriptor - 1), crew + _LINE * _ONE, 8)
    failed = 1 - call(function, block)
    swap(crew + _LINE * _OPEN, 0)
    looks = 0
    while load(crew + _LINE * _INSIDE):
        looks += 1
        if looks > _LOOKS_ALONE:
            libc_yield()
        else:
            pause()
    failed += load(crew + _LINE * _FAILED)
    swap(crew + _LINE * _LED, 0)
    return failed  # type: ignore[no-any-return]


@compiled
def help_crew(crew: int, helper: int, descriptor: int) -> None:
    """A helper's life: joins every job that it finds open, once; parks where there is none. Does not return."""
    parked = crew + _LINE * (_HELPERS + helper)
    room = np.zeros(1, np.int64)
    seen = looks = 0
    while True:
        number = load(crew + _LINE * _OPEN)
        if number != 0 and number != seen:
            seen, looks = number, 0
            take(crew + _LINE * _INSIDE, 1)
            # It may have been closed since, and what it was given may be gone.
            is_open = load(crew + _LINE * _OPEN) == number
            if is_open and call(load(crew + _LINE * _FUNCTION), load(crew + _LINE * _BLOCK)) != 1:
                take(crew + _LINE * _FAILED, 1)
            take(crew + _LINE * _INSIDE, -1)
            continue
        looks += 1
        if looks < _MOST_LOOKS and not load(crew + _LINE * _REST):
            pause()
            continue
        looks = 0
        swap(parked, descriptor + 1)
        number = load(crew + _LINE * _OPEN)
        if number != 0 and number != seen and swap(parked, 0):
            continue
        _libc_read(np.int32(descriptor), room.ctypes.data, 8)
