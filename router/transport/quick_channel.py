"""The router's end of a channel in shared memory, as machine code uses it: buffers at hand, and a stream that nothing waits on."""

import contextlib

import numpy as np

from router.errors import ChannelFull
from router.transport.channel import Channel
from router.transport.compiled_frames import as_word
from router.transport.frames import Sizes
from router.transport.payloads import Place
from router.transport.quick_hop import BUFFER, CHANNEL_WORDS, FD, INCARNATION, IS_USABLE, ROOM, SLOTS, TOKENS, Words
from router.transport.shared_memory import SharedMemoryChannel


class QuickChannel:
    """One thread uses it, the channel's own. `words` [CHANNEL_WORDS] are what machine code knows of it."""

    def __init__(self, channel: SharedMemoryChannel) -> None:
        self._channel = channel
        self._held = np.frombuffer(channel.mapping, np.uint8), np.frombuffer(channel.stream.room, np.uint8)
        self.words: Words = np.zeros(CHANNEL_WORDS, np.int64)
        self.words[[FD, INCARNATION]] = channel.stream.socket_fd, as_word(channel.stream.incarnation)
        self.words[[BUFFER, ROOM]] = [held.ctypes.data for held in self._held]
        channel.make_room = self.let_go

    @classmethod
    def of(cls, channel: Channel) -> "QuickChannel | None":
        """None for a channel of another kind."""
        return cls(channel) if isinstance(channel, SharedMemoryChannel) else None

    @property
    def num_tokens(self) -> int:
        """On their way."""
        return int(self.words[TOKENS])

    def prepare(self, num_bytes: int, *, is_wanted: bool) -> None:
        """Says whether machine code may use it, as things are now, and has a buffer of so many bytes at hand if there is one."""
        self.words[IS_USABLE] = is_wanted and self._channel.stream.is_quiet
        if not self.words[IS_USABLE]:
            return
        offsets, sizes = self.words[SLOTS::2], self.words[SLOTS + 1 :: 2]
        if (sizes >= num_bytes).any():
            return
        slot, pool = int(sizes.argmin()), self._channel.pool
        if sizes[slot]:
            pool.release(int(offsets[slot]))
            sizes[slot] = 0
        with contextlib.suppress(ChannelFull):
            offsets[slot] = pool.allocate(num_bytes)
            sizes[slot] = pool.size_of(int(offsets[slot]))

    def let_go(self) -> None:
        """Nothing is at hand any more: the channel needs the room for a frame of its own."""
        for slot in range(SLOTS, CHANNEL_WORDS, 2):
            if self.words[slot + 1]:
                self._channel.pool.release(int(self.words[slot]))
                self.words[slot + 1] = 0

    def release(self, offset: int) -> None:
        """A frame's place that found no empty slot."""
        self._channel.pool.release(offset)

    def place_of(self, offset: int, sizes: Sizes) -> Place:
        """Where a frame of these sizes lies, and its answer."""
        return self._channel.place_of(offset, sizes)

    def take_over(self, sequence: int, place: Place, offset: int, sent_at: float) -> None:
        """From here on the frame is the channel's, as if it had been sent there."""
        self.words[TOKENS] -= len(place.hidden)
        self._channel.take_over(sequence, place, offset, sent_at)

    def take(self, num_received: int) -> None:
        """So many bytes of something else that machine code has read go the channel's way. ChannelError as `receive` raises."""
        self._channel.stream.take(num_received)
