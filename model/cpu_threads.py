"""Work of a CPU in shares, each in a thread, where it is worth waking them."""

import contextlib
import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.cpu_parts import part_of, takers_of

logger = logging.getLogger("shoal")

# Multiplications and additions that one thread does while another is woken, some 50 us, and while one that is awake joins it.
MIN_SHARE, MIN_SHARE_AWAKE = 4_000_000, 400_000
_MOST_HELPERS = 255

_most: list[int] = []
_bound: list[int] = []


class _Crew:
    """The helpers of this process. They are started as they are needed, and live as long as it does."""

    def __init__(self) -> None:
        from model import cpu_crew  # brings Numba

        cpu_crew.prepare()
        self._lead, self._help = cpu_crew.lead, cpu_crew.help_crew
        self.table: npt.NDArray[np.int64] = cpu_crew.new_table(_MOST_HELPERS)
        self._rests, self._parked = cpu_crew.rest_of(self.table), cpu_crew.parked_of(self.table)
        self.address = self.table.ctypes.data
        self.num_helpers = 0
        self._can_grow = True
        self._lock = threading.Lock()

    def run(self, job: int, block: int, num_helpers: int) -> int:
        self.grow_to(num_helpers)
        return int(self._lead(self.address, min(num_helpers, self.num_helpers), job, block))

    @property
    def num_awake(self) -> int:
        """Helpers that look for jobs; none once they have been told to rest."""
        return 0 if self._rests[0] else self.num_helpers - int(np.count_nonzero(self._parked[: self.num_helpers]))

    def rest(self) -> None:
        self._rests[0] = 1

    def grow_to(self, num_helpers: int) -> None:
        if num_helpers <= self.num_helpers or not self._can_grow:
            return
        with self._lock:
            while self.num_helpers < min(num_helpers, _MOST_HELPERS):
                try:
                    self._start(self.num_helpers)
                except (RuntimeError, OSError) as error:
                    logger.warning("%d threads share the work of this process: no more can be started (%s)", 1 + self.num_helpers, error)
                    self._can_grow = False
                    return
                self.num_helpers += 1

    def _start(self, helper: int) -> None:
        descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            threading.Thread(target=self._help, args=(self.address, helper, descriptor), name=f"crew-{helper}", daemon=True).start()
        except RuntimeError:
            os.close(descriptor)
            raise


_crew: list[_Crew] = []
_lock = threading.Lock()
os.register_at_fork(after_in_child=_crew.clear)  # the threads stay behind


def allow(num_threads: int) -> None:
    """So many threads for a call at most, in place of as many as torch uses."""
    _most[:] = [num_threads]


def num_shares_of(num_operations: int) -> int:
    """In how many threads to do so many multiplications with an addition each."""
    most = _most[0] if _most else torch.get_num_threads()
    num_awake = _crew[0].num_awake if _crew else 0
    worth = max(num_operations // MIN_SHARE, min(num_operations // MIN_SHARE_AWAKE, 1 + num_awake))
    return max(1, min(most, *_bound, worth))


def lend(num_lent: int, num_cores: int) -> None:
    """Others need so many of the cores, until 0 gives them back: no more threads than are left, and helpers that wait go to sleep."""
    _bound[:] = [max(1, num_cores - num_lent)] if num_lent else []
    if num_lent:
        rest()


def rest() -> None:
    """Helpers that wait for the next job go to sleep now."""
    if _crew:
        _crew[0].rest()


def prepare() -> None:
    """Compiles what threads do together, seconds the first time on a machine and milliseconds after."""
    _this_crew()


def run_shares(job: int, words: Sequence[int], num_shares: int) -> None:
    """Calls a job (`model.cpu_parts`) in this thread and in helpers, so many of them woken; waits for those that have begun.

    All are given one block: a counter at 0, off which they take the parts of the work, and `words`. RuntimeError if it failed in one.
    """
    block = array("q", (0, *words))
    if _this_crew().run(job, block.buffer_info()[0], num_shares - 1):
        raise RuntimeError("compiled code failed; what it says of it is on stderr")


class Call(NamedTuple):
    """A job of many parts: its block's words behind the counter, and the place of that word among them which is how much to take at once.

    num_operations: multiplications with an addition, or what takes as long; `number` of things to take, in multiples of `step`.
    """

    job: int
    words: tuple[int, ...]
    part_at: int
    num_operations: int
    number: int
    step: int = 1


# Keeps a call and the tensors that it makes.
Keep = Callable[[Call, "torch.Tensor | tuple[torch.Tensor, ...]"], None]


class _Recorder(threading.local):
    keep: Keep | None = None


_recorder = _Recorder()


def run(call: Call, made: "torch.Tensor | tuple[torch.Tensor, ...]") -> None:
    """Does a call that makes these tensors, in as many threads as it is worth; or keeps it, where a recording is open on this thread."""
    if _recorder.keep is not None:
        _recorder.keep(call, made)
        return
    num_shares = num_shares_of(call.num_operations)
    part = part_of(call.number, num_shares, min(call.step, -(-call.number // num_shares)) or 1)
    words = list(call.words)
    words[call.part_at - 1] = part
    run_shares(call.job, words, takers_of(call.number, part, num_shares))


@contextlib.contextmanager
def recorded_by(keep: Keep) -> Iterator[None]:
    """Until it ends, `run` gives this thread's calls away instead of doing them."""
    assert _recorder.keep is None, "one recording at a time"
    _recorder.keep = keep
    try:
        yield
    finally:
        _recorder.keep = None


def crew_now() -> tuple[int, int, int]:
    """For calls that machine code does: the crew's address, its helpers, and how many threads a call may have now."""
    most = min(_most[0] if _most else torch.get_num_threads(), *_bound, _MOST_HELPERS + 1)
    return (*crew_of(most), most)


def run_alone(job: int, words: tuple[int, ...]) -> int:
    """Calls a job that leads its helpers itself; what it answers. RuntimeError if it failed."""
    block = array("q", (0, *words))
    answer = 1 - _this_crew().run(job, block.buffer_info()[0], 0)
    if not answer:
        raise RuntimeError("compiled code failed; what it says of it is on stderr")
    return answer


def crew_of(num_threads: int) -> tuple[int, int]:
    """For a job that leads helpers: the crew's address, and how many there are for so many threads."""
    crew = _this_crew()
    if num_threads > 1:
        crew.grow_to(num_threads - 1)
    return crew.address, min(num_threads - 1, crew.num_helpers)


def _this_crew() -> _Crew:
    if not _crew:
        with _lock:
            if not _crew:
                _crew.append(_Crew())
    return _crew[0]
