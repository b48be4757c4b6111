"""Work of a CPU in shares, each in a thread of a pool, where it is worth waking them."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

# Multiplications and additions that one thread does while another is woken: some 50 us.
MIN_SHARE = 4_000_000

_Counter = npt.NDArray[np.int64]

_lock = threading.Lock()
_helpers: list[ThreadPoolExecutor] = []
_most: list[int] = []
os.register_at_fork(after_in_child=_helpers.clear)  # the threads stay behind


def allow(num_threads: int) -> None:
    """So many threads for a call at most, in place of as many as torch uses. Unlike torch's, they sleep when there is nothing to do."""
    _most[:] = [num_threads]


def num_shares_of(num_operations: int) -> int:
    """In how many threads to do so many multiplications with an addition each."""
    return max(1, min(_most[0] if _most else torch.get_num_threads(), num_operations // MIN_SHARE))


def run_shares(share: Callable[[_Counter], None], num_shares: int) -> None:
    """Calls `share` in so many threads, or in fewer where they find no core in time; waits for those that have begun.

    All are given one counter [1], at 0, off which they take the parts of the work (`model.cpu_parts`): the last to end has seen
    to it that nothing is left. What a share raises is raised here, once all have ended. It must let go of the interpreter's lock.
    """
    counter = np.zeros(1, np.int64)
    if num_shares == 1:
        share(counter)
        return
    others = [_pool().submit(share, counter) for _ in range(num_shares - 1)]
    try:
        share(counter)
    finally:
        errors = [other.exception() for other in others if not other.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _pool() -> ThreadPoolExecutor:
    with _lock:
        if not _helpers:
            # They are started as they are needed.
            _helpers.append(ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "products"))
        return _helpers[0]
