"""The frames that a router has sent on one channel and not yet given back, and which answers still count."""

from dataclasses import dataclass

from torch import Tensor

from router.errors import FrameError
from router.transport.frames import FrameKind, Header


@dataclass(slots=True)
class SentFrame:
    """One frame on its way. `buffer`, `answer_offset` and the view `answer` are places in shared memory, where the channel has it."""

    attempt: int
    num_tokens: int
    hidden_size: int
    buffer: int = 0
    answer_offset: int = 0
    answer: Tensor | None = None
    is_answered: bool = False


class InFlight:
    """Sent frames by sequence number."""

    def __init__(self) -> None:
        self._frames: dict[int, SentFrame] = {}
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Frames that the host owes an answer."""
        return self._num_waiting

    def __len__(self) -> int:
        return len(self._frames)

    def begin(self, sequence: int, frame: SentFrame) -> None:
        """The frame has been sent; `sequence` is not in flight already."""
        assert sequence not in self._frames, f"sequence {sequence} is unique in the channel's life"
        self._frames[sequence] = frame
        self._num_waiting += 1

    def accept(self, header: Header) -> SentFrame | None:
        """The frame that this answer belongs to, now answered; None for a late, repeated or unasked one.

        FrameError where a partial sum has not the size of its request.
        """
        frame = self._frames.get(header.sequence)
        if frame is None or frame.is_answered or frame.attempt != header.attempt:
            return None
        if header.kind == FrameKind.PARTIAL and (header.num_tokens, header.hidden_size) != (frame.num_tokens, frame.hidden_size):
            raise FrameError(
                f"the host answered [{frame.num_tokens}, {frame.hidden_size}] tokens with [{header.num_tokens}, {header.hidden_size}]"
            )
        frame.is_answered = True
        self._num_waiting -= 1
        return frame

    def end(self, sequence: int) -> SentFrame | None:
        """Forgets the frame; None if it is not in flight. `is_answered` says whether its buffer is ours again."""
        frame = self._frames.pop(sequence, None)
        if frame is not None and not frame.is_answered:
            self._num_waiting -= 1
        return frame
