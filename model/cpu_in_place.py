"""Experts that machine code computes on its own: no interpreter between a frame that has arrived and its answer.

A layer is a record: words that tell what computes it, and what that must know. The table of a process has the address of each layer's
record, and of nothing else, so that a layer is replaced by one word. Who replaces it keeps the old one until nobody computes with it.

Words of a record: the job, which answers 1 where it has computed the block it was given, anything else where it has not; hidden size;
bytes of an expert; experts that are held; tokens whose arithmetic takes as long as reading an expert; then the job's own.
Words of a job's block, from 1 on: hidden [T, H], expert_ids [T, K] int16, weights [T, K], partial [T, H] by their addresses; T; K; the
record; the crew and how many of its helpers may join.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from model.cpu_crew import call, load, swap
from model.cpu_parts import array_at, compile_for, word
from model.cpu_product import compiled

Words = npt.NDArray[np.int64]

JOB, HIDDEN_SIZE, EXPERT_BYTES, NUM_HELD, TOKENS_READ, OWN = range(6)
BLOCK_WORDS = 10
MAX_LAYERS = 1024

# Places in the table.
_TURN, _IS_OPEN, _MOST_BYTES, _CREW, _HELPERS, _FRAMES, _TOKENS, _BUSY_NS, _LAYERS = range(9)
_WAIT_S = 50e-6
_NS = 1_000_000_000
_MONOTONIC = 1  # of the kernel's clocks
_libc_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))


class InPlaceTable:
    """The layers that one thread computes in place, and what it has done so far. Others put layers, and read the sums."""

    def __init__(self) -> None:
        self._words: Words = np.zeros(_LAYERS + MAX_LAYERS, np.int64)
        self.address: int = self._words.ctypes.data

    def open(self, max_bytes: int, crew: int = 0, num_helpers: int = 0) -> None:
        """From now on what takes no longer than to read `max_bytes` of weights is computed, with so many helpers of a crew."""
        self._words[[_MOST_BYTES, _CREW, _HELPERS]] = max_bytes, crew, num_helpers
        swap_word(self.address + 8 * _IS_OPEN, 1)

    def close(self) -> None:
        """Nothing is computed any more; what is under way is waited for. Idempotent."""
        swap_word(self.address + 8 * _IS_OPEN, 0)
        self._wait()

    def put(self, layer: int, record: Words | None) -> None:
        """Replaces a layer's record. When it returns, nobody computes with the one before."""
        if 0 <= layer < MAX_LAYERS:
            swap_word(self.address + 8 * (_LAYERS + layer), 0 if record is None else record.ctypes.data)
            self._wait()

    @property
    def num_frames(self) -> int:
        """Batches that were computed."""
        return int(self._words[_FRAMES])

    @property
    def num_tokens(self) -> int:
        """Their tokens."""
        return int(self._words[_TOKENS])

    @property
    def busy_s(self) -> float:
        """What they took."""
        return float(self._words[_BUSY_NS]) / _NS

    def _wait(self) -> None:
        turn = self._words[_TURN]
        while turn % 2 and self._words[_TURN] == turn:  # some milliseconds at most: that is what `max_bytes` is for
            time.sleep(_WAIT_S)


def prepare() -> None:
    """Compiles, a second the first time on a machine and milliseconds after."""
    code: Any = swap_word
    compile_for(code, "int64(int64, int64)")


@compiled
def swap_word(address: int, value: int) -> int:
    """Stores a word as one that other threads see in its order; the one that was there."""
    return swap(address, value)  # type: ignore[no-any-return]


@compiled
def nanoseconds(room: int) -> int:
    """Of the monotonic clock; `room` is the address of two words."""
    _libc_clock(np.int32(_MONOTONIC), room)
    return word(room, 0) * _NS + word(room, 1)  # type: ignore[no-any-return]


@compiled
def compute_in_place(
    table: int, block: Words, layer: int, hidden: int, ids: int, weights: int, partial: int, num_tokens: int, size: int, top_k: int
) -> Any:
    """Partial [T, H] of a batch by the addresses of its arrays; whether it was computed. `block` is room for BLOCK_WORDS words."""
    if layer < 0 or layer >= MAX_LAYERS:
        return False
    turn = load(table + 8 * _TURN) + 1
    swap(table + 8 * _TURN, turn)  # before the record is looked for: who has replaced it waits from here on
    record = load(table + 8 * (_LAYERS + layer))
    is_done = False
    if record != 0 and load(table + 8 * _IS_OPEN) != 0 and _is_small(table, record, num_tokens, size, top_k):
        started = nanoseconds(block.ctypes.data)
        sums = array_at(np.empty(0, np.float32), partial, (num_tokens * size,))
        sums[:] = np.float32(0)
        block[0] = 0
        block[1], block[2], block[3], block[4] = hidden, ids, weights, partial
        block[5], block[6], block[7] = num_tokens, top_k, record
        block[8], block[9] = word(table, _CREW), word(table, _HELPERS)
        is_done = call(word(record, JOB), block.ctypes.data) == 1
        if is_done:
            done = array_at(np.empty(0, np.int64), table, (_LAYERS,))
            done[_FRAMES] += 1
            done[_TOKENS] += num_tokens
            done[_BUSY_NS] += nanoseconds(block.ctypes.data) - started
    swap(table + 8 * _TURN, turn + 1)
    return is_done


@compiled
def _is_small(table: int, record: int, num_tokens: int, size: int, top_k: int) -> Any:
    if size != word(record, HIDDEN_SIZE):
        return False
    num_choices, most = num_tokens * top_k, word(table, _MOST_BYTES)
    num_read = max(min(num_choices, word(record, NUM_HELD)), num_choices // word(record, TOKENS_READ))
    return num_read * word(record, EXPERT_BYTES) <= most
