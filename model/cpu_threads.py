"""Work of a CPU in shares, each in a thread of a pool, where it is worth waking them."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Multiplications and additions that one thread does while another is woken: some 50 us.
MIN_SHARE = 4_000_000

_lock = threading.Lock()
_helpers: list[ThreadPoolExecutor] = []
_most: list[int] = []
os.register_at_fork(after_in_child=_helpers.clear)  # the threads stay behind


def allow(num_threads: int) -> None:
    """So many threads at most, in place of as many as torch uses. Unlike torch's, they sleep when there is nothing to do."""
    with _lock:
        _most[:] = [num_threads]
        _helpers.clear()


def num_shares_of(num_operations: int) -> int:
    """Into how many shares to divide so many multiplications with an addition each."""
    return max(1, min(_num_threads(), num_operations // MIN_SHARE))


def run_shares(share: Callable[[int, int], None], number: int, num_shares: int, step: int = 1) -> None:
    """Calls share(first, last) for parts of range(number) that begin at multiples of `step`, each in a thread; waits for all.

    What a share raises is raised here, once all have ended. The share must let go of the interpreter's lock.
    """
    size = max(1, -(-number // (num_shares * step))) * step
    bounds = [(first, min(first + size, number)) for first in range(0, number, size)]
    if len(bounds) <= 1:
        share(0, number)
        return
    others = [_pool().submit(share, *bound) for bound in bounds[1:]]
    try:
        share(*bounds[0])
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def _num_threads() -> int:
    return _most[0] if _most else torch.get_num_threads()


def _pool() -> ThreadPoolExecutor:
    with _lock:
        if not _helpers:
            _helpers.append(ThreadPoolExecutor(max(1, _num_threads() - 1), "products"))
        return _helpers[0]
