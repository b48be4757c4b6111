"""A decode step's way to hosts of this node and back, in two calls of machine code: lay out and send, wait and add up.

What the two do is what `router.dispatch` does over any channel, frame for frame; they know only the case in which nothing is unusual,
and stop where something is, with what they have done so far told in words.
"""

from typing import Any

import numpy as np
from numba import types

from model.cpu_crew import libc_yield
from model.cpu_in_place import nanoseconds
from model.cpu_parts import array_at, keep, word
from router.compiled import compiled
from router.grouping import FEW_SPARED
from router.transport.compiled_frames import answer_offset, ids_offset, is_answer, shared_bytes, weights_offset, write_request
from router.transport.frames import HEADER_BYTES

Words = np.ndarray[Any, np.dtype[np.int64]]

# Words of a channel: whether machine code may use it, tokens on their way, its stream and the life of it, its buffer, the room that a
# header is read to; then what is at hand of the buffer, an offset and its bytes for each slot, 0 bytes in an empty one.
IS_USABLE, TOKENS, FD, INCARNATION, BUFFER, ROOM, SLOTS = range(7)
NUM_SLOTS = 2  # as many batches as are on their way at once
CHANNEL_WORDS = SLOTS + 2 * NUM_SLOTS
# Words of a frame, one for each host: 0 tokens for a host that has none. `RECEIVED`: bytes of something else that lie in the room.
# `IS_KEPT`: its place in the buffer found no empty slot.
NUM_TOKENS, TAKES_ALL, SEQUENCE, PLACE, CAPACITY, ANSWER, IS_SENT, IS_ANSWERED, IS_KEPT, RECEIVED, FRAME_WORDS = range(11)

# What `send_batch` answers in place of the number of frames: not for machine code, and nothing has been done; not all have been sent.
UNUSUAL, SENT_IN_PART = 0, -1
# What `await_batch` answers; COMPLETE where some places are kept.
COMPLETE, COMPLETE_AND_KEPT, TOO_LATE, INTERRUPTED = range(4)

_POLL_BYTES = 8
_READABLE = 1  # POLLIN
_DONT_WAIT, _NO_SIGNAL = 0x40, 0x4000  # MSG_ of Linux
_libc_poll = types.ExternalFunction("poll", types.int32(types.intp, types.uint64, types.int32))
_libc_recv = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.intp, types.int32))
_libc_send = types.ExternalFunction("send", types.intp(types.int32, types.intp, types.intp, types.int32))


@compiled
def send_batch(
    channels: Words,
    table: Words,
    hosts: Words,
    counts: Words,
    ids_place: int,
    weights_place: int,
    hidden_place: int,
    num_tokens: int,
    top_k: int,
    size: int,
    layer: int,
    epoch: int,
    n: int,
    sequence: int,
    frames: Words,
    rows: Words,
) -> int:
    """Sends a decode step's hidden [T, H] float32 to the hosts of its choices, ids [T, K] int64, a host's tokens in one frame; how many.

    A choice's host is in `hosts` [T, K] or, where that is empty, in `table` [E + 1] by its expert. channels [N]: the address of each
    host's words, 0 for one that is not for machine code. counts [E] are added to; frames [N, FRAME_WORDS] and rows [N, T] are told.
    """
    floats, num_hosts, num_experts = np.empty(0, np.float32), len(channels), min(len(table) - 1, len(counts))
    ids = array_at(np.empty(0, np.int64), ids_place, (num_tokens, top_k))
    weights, hidden = array_at(floats, weights_place, (num_tokens, top_k)), array_at(floats, hidden_place, (num_tokens, size))
    host_of = np.empty((num_tokens, top_k), np.int64)
    last = np.zeros(num_hosts, np.int64)  # the last token, counted from 1, that was counted for a host
    frames[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            if ids[t, k] < 0 or ids[t, k] >= num_experts:
                return UNUSUAL
            host = hosts[t, k] if hosts.size else table[ids[t, k]]
            if host < 0:
                return UNUSUAL
            host_of[t, k] = host
            if last[host] != t + 1:
                last[host] = t + 1
                frames[host, NUM_TOKENS] += 1
    for host in range(num_hosts):
        if frames[host, NUM_TOKENS] and not _find_place(channels[host], frames[host], num_tokens, size, top_k):
            return UNUSUAL
    headers, number = np.empty((num_hosts, HEADER_BYTES), np.uint8), 0
    for host in range(num_hosts):
        if frames[host, NUM_TOKENS]:
            frame, channel = frames[host], array_at(frames, channels[host], (CHANNEL_WORDS,))
            frame[SEQUENCE] = sequence + host
            channel[TOKENS] += frame[NUM_TOKENS]
            for slot in range(SLOTS, CHANNEL_WORDS, 2):
                if channel[slot] == frame[PLACE]:
                    channel[slot + 1] = 0
            _lay_out(channel[BUFFER] + frame[PLACE], host, host_of, ids, weights, hidden, frame, rows[host])
            write_request(
                headers[host].ctypes.data,
                channel[INCARNATION],
                frame[SEQUENCE],
                epoch,
                n,
                layer,
                frame[NUM_TOKENS],
                size,
                top_k,
                frame[PLACE],
            )
    for host in range(num_hosts):
        if frames[host, NUM_TOKENS]:
            fd, place = word(channels[host], FD), headers.ctypes.data + host * HEADER_BYTES
            sent = _libc_send(np.int32(fd), place, HEADER_BYTES, np.int32(_DONT_WAIT | _NO_SIGNAL))
            frames[host, IS_SENT] = sent == HEADER_BYTES  # of so few bytes a Unix socket takes all or none
            number = SENT_IN_PART if number < 0 or sent != HEADER_BYTES else number + 1
    keep(headers)
    for t in range(num_tokens):
        for k in range(top_k):
            counts[ids[t, k]] += 1
    return number


@compiled
def _find_place(address: int, frame: Words, num_tokens: int, size: int, top_k: int) -> Any:
    """Whether the tokens of a frame have a place at hand in their channel's buffer. A host of nearly all tokens gets all."""
    if address == 0 or word(address, IS_USABLE) == 0:
        return False
    frame[TAKES_ALL] = (num_tokens - frame[NUM_TOKENS]) * FEW_SPARED <= num_tokens
    if frame[TAKES_ALL]:
        frame[NUM_TOKENS] = num_tokens
    needed, slot = shared_bytes(frame[NUM_TOKENS], size, top_k), SLOTS
    while word(address, slot + 1) < needed:
        slot += 2
        if slot == CHANNEL_WORDS:
            return False
    frame[PLACE], frame[CAPACITY] = word(address, slot), word(address, slot + 1)
    frame[ANSWER] = frame[PLACE] + answer_offset(frame[NUM_TOKENS], size, top_k)
    return True


@compiled
def give_back(address: int, frame: Words) -> Any:
    """The frame needs its place no more: into an empty slot with it; whether there was one."""
    channel = array_at(frame, address, (CHANNEL_WORDS,))
    channel[TOKENS] -= frame[NUM_TOKENS]
    for slot in range(SLOTS, CHANNEL_WORDS, 2):
        if channel[slot + 1] == 0:
            channel[slot], channel[slot + 1] = frame[PLACE], frame[CAPACITY]
            return True
    return False


@compiled
def _lay_out(place: int, host: int, host_of: Words, ids: Words, weights: Any, hidden: Any, frame: Words, rows: Words) -> None:
    """A request as `payload_layout` says, of the tokens that go to one host; the ids of other hosts' experts become -1."""
    number, size, top_k = frame[NUM_TOKENS], hidden.shape[1], ids.shape[1]
    floats = np.empty(0, np.float32)
    to_hidden = array_at(floats, place, (number, size))
    to_weights = array_at(floats, place + weights_offset(number, size), (number, top_k))
    to_ids = array_at(np.empty(0, np.int16), place + ids_offset(number, size, top_k), (number, top_k))
    row = 0
    for t in range(len(ids)):
        is_wanted = frame[TAKES_ALL] != 0
        for k in range(top_k):
            is_wanted |= host_of[t, k] == host
        if not is_wanted:
            continue
        for k in range(top_k):
            to_ids[row, k] = ids[t, k] if host_of[t, k] == host else -1
            to_weights[row, k] = weights[t, k]
        for h in range(size):
            to_hidden[row, h] = hidden[t, h]
        rows[row] = t
        row += 1


@compiled
def await_batch(channels: Words, frames: Words, rows: Words, timeout_ns: int, look_ns: int, place: int, num_tokens: int, size: int) -> int:
    """Waits for the answers of all frames, `look_ns` of it awake, and puts their sum into total [T, H] float32 at `place`.

    Whole answers first, then those of some rows, each in the hosts' order. INTERRUPTED: something else has come on a channel, or its end.
    """
    num_hosts = len(channels)
    clock, polls, hosts = np.empty(2, np.int64), np.empty(num_hosts * _POLL_BYTES // 4, np.int32), np.empty(num_hosts, np.int64)
    began = nanoseconds(clock.ctypes.data)
    while True:
        number = 0
        for host in range(num_hosts):
            if frames[host, NUM_TOKENS] and not frames[host, IS_ANSWERED]:
                polls[2 * number], polls[2 * number + 1], hosts[number] = word(channels[host], FD), _READABLE, host
                number += 1
        if number == 0:
            break
        ready = _wait(polls.ctypes.data, number, clock.ctypes.data, began, timeout_ns, look_ns)
        if ready <= 0:
            if nanoseconds(clock.ctypes.data) - began >= timeout_ns:
                return TOO_LATE
            continue
        for index in range(number):
            if polls[2 * index + 1] >> 16 and not _receive(channels[hosts[index]], frames[hosts[index]], size):
                return INTERRUPTED
    keep(clock, polls)
    _add_up(channels, frames, rows, array_at(np.empty(0, np.float32), place, (num_tokens, size)))
    answer = COMPLETE
    for host in range(num_hosts):
        if frames[host, NUM_TOKENS] and not give_back(channels[host], frames[host]):
            frames[host, IS_KEPT] = 1
            answer = COMPLETE_AND_KEPT
    return answer


@compiled
def _receive(channel: int, frame: Words, size: int) -> Any:
    """Whether what has arrived is the frame's answer."""
    room = word(channel, ROOM)
    received = _libc_recv(np.int32(word(channel, FD)), room, HEADER_BYTES, np.int32(_DONT_WAIT))
    if received == HEADER_BYTES and is_answer(room, word(channel, INCARNATION), frame[SEQUENCE], frame[NUM_TOKENS], size, frame[ANSWER]):
        frame[IS_ANSWERED] = 1
        return True
    frame[RECEIVED] = max(received, 0)
    return False


@compiled
def _wait(polls: int, number: int, clock: int, began: int, timeout_ns: int, look_ns: int) -> int:
    """For the first of the descriptors. Between two looks whoever else can run goes first: a peer that waits for this core has it."""
    while nanoseconds(clock) - began < look_ns:
        ready = _libc_poll(polls, np.uint64(number), np.int32(0))
        if ready != 0:
            return ready  # type: ignore[no-any-return]
        libc_yield()
    left_ms = (timeout_ns - (nanoseconds(clock) - began) + 999_999) // 1_000_000
    return _libc_poll(polls, np.uint64(number), np.int32(max(left_ms, 0)))  # type: ignore[no-any-return]


@compiled
def _add_up(channels: Words, frames: Words, rows: Words, total: Any) -> None:
    num_hosts, (num_tokens, size) = len(channels), total.shape
    floats, is_first = np.empty(0, np.float32), True
    for host in range(num_hosts):
        if frames[host, NUM_TOKENS] and frames[host, TAKES_ALL]:
            partial = array_at(floats, word(channels[host], BUFFER) + frames[host, ANSWER], (num_tokens, size))
            for t in range(num_tokens):
                for h in range(size):
                    total[t, h] = partial[t, h] if is_first else total[t, h] + partial[t, h]
            is_first = False
    if is_first:
        total[:] = np.float32(0)
    for host in range(num_hosts):
        number = frames[host, NUM_TOKENS]
        if number and not frames[host, TAKES_ALL]:
            partial = array_at(floats, word(channels[host], BUFFER) + frames[host, ANSWER], (number, size))
            for row in range(number):
                to = total[rows[host, row]]
                for h in range(size):
                    to[h] += partial[row, h]
