"""Calls of jobs that are made once and done again and again: a decode step's, which differ from step to step in nothing but numbers.

To make a call from Python costs as much as many a job takes, and is paid dozens of times a layer. While a recording is open on a
thread, `cpu_threads.run` keeps its calls instead of doing them; `replay` does them all in one call of machine code, in their order.
What is recorded reads and writes tensors by their addresses, so the recording holds them: what goes in is copied into them first.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import cpu_threads
from model.cpu_crew import lead, num_awake
from model.cpu_parts import PARTS_OF_A_SHARE, array_at, compile_for
from model.cpu_product import compiled
from model.cpu_threads import MIN_SHARE, MIN_SHARE_AWAKE, Call

_Words = npt.NDArray[np.int64]

# Operations of torch that compute nothing: new memory, and views, where they are views of what they are given.
_EMPTY = frozenset({"empty", "empty_like", "new_empty"})
_VIEWS = frozenset(
    {"view", "slice", "split", "split_with_sizes", "select", "transpose", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "t"}
    | {"flatten", "reshape", "_unsafe_view", "_reshape_alias", "unbind", "chunk", "narrow", "permute", "expand", "contiguous"}
)


class NotRecordable(Exception):
    """Something was computed that is no job: it would be missing from the replay."""


class _NothingElse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation of torch that is not a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, made = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name in _EMPTY:
            return made
        views = made if isinstance(made, list | tuple) else (made,)
        if name not in _VIEWS or any(_memory_of(view) != _memory_of(args[0]) for view in views):
            raise NotRecordable(name)
        return made


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording:
    """Calls in their order, and what they read and write."""

    def __init__(self) -> None:
        self._held: list[object] = []
        self._calls: list[tuple[int, ...]] = []
        self._table: _Words = np.zeros((0, 6), np.int64)
        self.num_bytes = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Until it ends, this thread's calls are kept here. NotRecordable where anything else is computed."""
        with _NothingElse(), cpu_threads.recorded_by(self._keep):  # type: ignore[no-untyped-call]
            yield
        self._table = np.array(self._calls, np.int64).reshape(-1, 6)

    def replay(self) -> None:
        """Does the calls. RuntimeError if one failed."""
        crew, num_helpers, most = cpu_threads.crew_now()
        if _replay(crew, num_helpers, most, self._table):
            raise RuntimeError("compiled code failed; what it says of it is on stderr")

    def _keep(self, call: Call, made: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        block = np.array((0, *call.words), np.int64)
        self._held += [block, made]
        self.num_bytes += sum(each.nbytes for each in (made if isinstance(made, tuple) else (made,)))
        self._calls.append((call.job, block.ctypes.data, call.part_at, call.num_operations, call.number, call.step))


def prepare() -> None:
    """Compiles, seconds the first time on a machine and milliseconds after."""
    code: Any = _replay
    compile_for(code, "int64(int64, int64, int64, int64[:, ::1])")


@compiled
def _replay(crew: int, num_helpers: int, most: int, calls: _Words) -> int:
    """How many calls failed; the first that does is the last."""
    for index in range(len(calls)):
        job, block, part_at, num_operations, number, step = calls[index]
        awake = num_awake(crew, num_helpers)
        worth = max(num_operations // MIN_SHARE, min(num_operations // MIN_SHARE_AWAKE, 1 + awake))
        shares = max(1, min(most, worth))
        step = min(step, (number + shares - 1) // shares)
        part = max(number, 1)
        if shares > 1:
            parts = PARTS_OF_A_SHARE * shares * step
            part = max(1, (number + parts - 1) // parts) * step
        words = array_at(calls, block, (part_at + 1,))
        words[0], words[part_at] = 0, part
        takers = max(1, min(shares, (number + part - 1) // part))
        if lead(crew, min(takers - 1, num_helpers), job, block):
            return 1
    return 0
