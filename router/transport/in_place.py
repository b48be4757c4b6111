"""A host's decode frames answered by machine code: waited for, read, checked, computed and told without the interpreter.

Between a frame and its answer Python would cost as much as the experts do: its code is out of the caches, since weights went through
them, and its lock may be held by any other thread. So the listener's thread waits in here, and comes back with whatever else arrives.
"""

import platform
import select
from typing import Any

import numpy as np
from numba import types

from model import cpu_in_place
from model.cpu_crew import swap
from model.cpu_in_place import BLOCK_WORDS, InPlaceTable, Words, compute_in_place, swap_word
from model.cpu_parts import compile_for, word
from router.compiled import compiled
from router.transport.compiled_frames import (
    answer_offset,
    as_word,
    hidden_size_of,
    ids_offset,
    is_decode,
    layer_of,
    load_32,
    offset_of,
    tokens_of,
    top_k_of,
    weights_offset,
    write_partial,
)
from router.transport.frames import HEADER_BYTES

# Words of a channel: what its frames are checked against, where they are read to, and three that Python changes.
_INCARNATION, _BUFFER, _BUFFER_BYTES, _ROOM, _IS_BETWEEN, _OUTPUT, _TICKETS, _CHANNEL_WORDS = range(8)
# Words of a desk: what `serve` is called with, and what it tells beside the number of events.
_EPOLL, _EVENTS, _CHANNELS, _NUM_CHANNELS, _TABLE, _HEADER, _RECEIVED, _UNSENT, _DESK_WORDS = range(9)

_MOST_EVENTS = 64
# The kernel's struct epoll_event is packed on this one machine only.
_EVENT_BYTES, _EVENT_FD = (12, 4) if platform.machine() == "x86_64" else (16, 8)
_EVENT = np.dtype({"names": ["events", "fd"], "formats": ["<u4", "<i4"], "offsets": [0, _EVENT_FD], "itemsize": _EVENT_BYTES})
_READABLE = select.EPOLLIN
_DONT_WAIT, _NO_SIGNAL = 0x40, 0x4000  # MSG_ of Linux
_libc_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.intp, types.int32, types.int32))
_libc_recv = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.intp, types.int32))
_libc_send = types.ExternalFunction("send", types.intp(types.int32, types.intp, types.intp, types.int32))


class InPlaceChannel:
    """What machine code knows of one router's channel. `room` takes a header; the buffer must stay mapped as long as this is watched."""

    def __init__(self, incarnation: int, buffer: memoryview, room: memoryview) -> None:
        self._held = np.frombuffer(buffer, np.uint8), np.frombuffer(room, np.uint8)
        self.words: Words = np.zeros(_CHANNEL_WORDS, np.int64)
        places = [held.ctypes.data for held in self._held]
        self.words[[_INCARNATION, _BUFFER, _BUFFER_BYTES, _ROOM]] = as_word(incarnation), places[0], len(buffer), places[1]
        self.words[_IS_BETWEEN] = 1
        self.output = OutputLock(self.words, _OUTPUT)

    def set_between_frames(self, *, is_between: bool) -> None:
        """Whether the stream has been read up to the end of a frame: only then machine code reads on."""
        self.words[_IS_BETWEEN] = is_between

    def set_num_tickets(self, number: int) -> None:
        """Frames that wait for the compute thread: while there are any, the order of this channel's is Python's."""
        self.words[_TICKETS] = number


class OutputLock:
    """Who may write to a channel's stream: machine code takes it for one header, Python until all that is queued has left."""

    def __init__(self, words: Words, place: int) -> None:
        self._words = words
        self._address = words.ctypes.data + 8 * place
        self._is_mine = False

    def acquire(self) -> None:
        """For Python, under a lock of its own. Returns at once if it has it."""
        while not self._is_mine:
            self._is_mine = swap_word(self._address, 1) == 0

    def release(self) -> None:
        """Nothing is queued any more."""
        if self._is_mine:
            self._is_mine = False
            swap_word(self._address, 0)


class InPlacePoll:
    """A listener's epoll. One thread uses it. `received` and `unsent` are of the one event that `poll` has returned last."""

    def __init__(self, epoll: select.epoll, table: InPlaceTable) -> None:
        self._channels: Words = np.zeros(64, np.int64)
        self._watched: dict[int, InPlaceChannel] = {}
        self._events = np.zeros(_MOST_EVENTS, _EVENT)
        self._header = np.zeros(HEADER_BYTES, np.uint8)
        self._desk: Words = np.zeros(_DESK_WORDS, np.int64)
        self._desk[[_EPOLL, _EVENTS, _TABLE, _HEADER]] = epoll.fileno(), self._events.ctypes.data, table.address, self._header.ctypes.data
        self._epoll, self._table = epoll, table
        prepare()

    @property
    def num_answered(self) -> int:
        """Frames, since the start."""
        return self._table.num_frames

    def watch(self, fd: int, channel: InPlaceChannel) -> None:
        """Answers this channel's frames from now on."""
        if fd >= len(self._channels):
            self._channels = np.concatenate([self._channels, np.zeros(fd + 1, np.int64)])
        self._watched[fd] = channel
        self._channels[fd] = channel.words.ctypes.data

    def forget(self, fd: int) -> None:
        """And no longer. Of one that is not watched it is a no-op."""
        if self._watched.pop(fd, None) is not None:
            self._channels[fd] = 0

    def poll(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Waits for what is not machine code's: descriptors and their events. With a time-out, all is left to Python."""
        if timeout_s is not None:
            self._desk[[_RECEIVED, _UNSENT]] = 0
            return self._epoll.poll(timeout_s)
        self._desk[_CHANNELS], self._desk[_NUM_CHANNELS] = self._channels.ctypes.data, len(self._channels)
        arrived = self._events[: _serve(self._desk)]
        return list(zip(arrived["fd"].tolist(), arrived["events"].tolist(), strict=True))

    @property
    def received(self) -> int:
        """Bytes of the event's descriptor that lie in its channel's room already, not to be read again."""
        return int(self._desk[_RECEIVED])

    @property
    def unsent(self) -> bytes | None:
        """The header of an answer that the event's descriptor would not take from machine code."""
        return self._header.tobytes() if self._desk[_UNSENT] else None


def prepare() -> None:
    """Compiles, seconds the first time on a machine and milliseconds after."""
    cpu_in_place.prepare()
    code: Any = _serve
    compile_for(code, "int64(int64[::1])")


@compiled
def _serve(desk: Words) -> int:
    """Answers frames until something comes that is not one of a decode step, alone; how many events there are then."""
    block = np.empty(BLOCK_WORDS, np.int64)
    events, header = desk[_EVENTS], desk[_HEADER]
    desk[_RECEIVED] = desk[_UNSENT] = 0
    while True:
        number = _libc_epoll_wait(np.int32(desk[_EPOLL]), events, np.int32(_MOST_EVENTS), np.int32(-1))
        if number != 1:
            return max(number, 0)  # type: ignore[no-any-return]
        fd = load_32(events + _EVENT_FD)
        if load_32(events) != _READABLE or fd >= desk[_NUM_CHANNELS]:
            return 1
        channel = word(desk[_CHANNELS], fd)
        if channel == 0 or word(channel, _IS_BETWEEN) == 0 or word(channel, _TICKETS) != 0:
            return 1
        room = word(channel, _ROOM)
        received = _libc_recv(np.int32(fd), room, HEADER_BYTES, np.int32(_DONT_WAIT))
        if received <= 0:
            return 1
        if received < HEADER_BYTES or not is_decode(room, word(channel, _INCARNATION), word(channel, _BUFFER_BYTES)):
            desk[_RECEIVED] = received
            return 1
        num_tokens, size, top_k, offset = tokens_of(room), hidden_size_of(room), top_k_of(room), offset_of(room)
        hidden = word(channel, _BUFFER) + offset
        weights, ids = hidden + weights_offset(num_tokens, size), hidden + ids_offset(num_tokens, size, top_k)
        answer = answer_offset(num_tokens, size, top_k)
        if not compute_in_place(desk[_TABLE], block, layer_of(room), hidden, ids, weights, hidden + answer, num_tokens, size, top_k):
            desk[_RECEIVED] = received
            return 1
        write_partial(header, room, offset + answer)
        output = channel + 8 * _OUTPUT
        if swap(output, 1):
            desk[_UNSENT] = 1  # Python is about to write, or has not written all
            return 1
        sent = _libc_send(np.int32(fd), header, HEADER_BYTES, np.int32(_DONT_WAIT | _NO_SIGNAL))
        swap(output, 0)
        if sent != HEADER_BYTES:  # of so few bytes a Unix socket takes all or none
            desk[_UNSENT] = 1
            return 1
