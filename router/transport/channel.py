"""The channel protocol: the router's end and the host's end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.transport.frames import ExpertsAnswer, ExpertsRequest


class Channel(Protocol):
    """The router's end. One thread uses it. Raises ChannelClosed from any method once the peer is gone."""

    def send(self, sequence: int, attempt: int, request: ExpertsRequest) -> None:
        """Sends one frame; `sequence` is unique in the channel's life. ChannelFull if no buffer is free."""
        ...

    def receive(self) -> ExpertsAnswer | None:
        """The next answer if one has arrived, else None; never blocks. PONGs and late duplicates are consumed inside.

        The partial sum may lie in shared memory: it stays valid until `release(sequence)`.
        """
        ...

    def release(self, sequence: int, *, abandoned: bool = False) -> None:
        """Gives back the buffer of an answered frame; of an abandoned one (timed out) it is set aside, never reused."""
        ...

    def fileno(self) -> int:
        """Readable when `receive` may have an answer, or the peer is gone."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


@dataclass(frozen=True)
class Incoming:
    """A frame that has arrived at a host: the request, and how to answer it (thread-safe, once, never blocks for long).

    `answer` of a gone peer is a no-op: a host never waits for a router.
    """

    sequence: int
    attempt: int
    request: ExpertsRequest
    answer: Callable[[ExpertsAnswer], None] = field(compare=False)
