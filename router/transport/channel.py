"""The channel protocol: the router's end and the host's end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.transport.frames import ExpertsAnswer, ExpertsRequest
from router.transport.heartbeat import Heartbeat, HeartbeatLimits


@dataclass(frozen=True)
class ChannelLimits:
    """The router's end. `shared_bytes` (a power of two) is address space: memory is taken as buffers are first used."""

    connect_timeout_s: float = 5.0
    send_timeout_s: float = 5.0
    heartbeat: HeartbeatLimits = field(default_factory=HeartbeatLimits)
    shared_bytes: int = 1 << 29
    max_payload_bytes: int = 1 << 29
    max_queued_bytes: int = 1 << 28
    max_frames: int = 1024


class Channel(Protocol):
    """The router's end. One thread uses it. `send` and `receive` raise ChannelClosed once the peer is gone.

    Liveness is inside `receive`: while answers are owed it sends a PING after `heartbeat.interval_s` of silence and raises
    ChannelClosed when one stays unanswered, so a router that waits calls `receive` at least that often, readable or not.
    Slow is a host that answers PINGs: `heartbeat.last_heard` is the monotonic time of its last sign of life, and
    `heartbeat.num_answered` counts the frames that it has answered to anyone, as of its last PONG: while that moves, it works.
    """

    @property
    def is_on_node(self) -> bool:
        """Whether the host computes on the cores of this node."""
        ...

    @property
    def heartbeat(self) -> Heartbeat:
        """The host's signs of life, to be read only."""
        ...

    def send(self, sequence: int, attempt: int, request: ExpertsRequest) -> None:
        """Sends one frame; `sequence` is unique in the channel's life. ChannelFull if no buffer is free.

        FrameError for a request that no buffer of this channel can hold, or with tensors of the wrong shape or type; the
        channel goes on. The request's tensors are free to change when it returns.
        """
        ...

    def receive(self) -> ExpertsAnswer | None:
        """The next answer if one has arrived, else None; never blocks. PONGs and late duplicates are consumed inside.

        The partial sum may lie in shared memory: it stays valid until `release(sequence)`. FrameError closes the channel.
        """
        ...

    def release(self, sequence: int, *, abandoned: bool = False) -> None:
        """Gives back the buffer of an answered frame; of an abandoned one (timed out) it is set aside, never reused.

        A frame that is not answered counts as abandoned whatever is said; the host is told to skip it.
        """
        ...

    def fileno(self) -> int:
        """Readable when `receive` may have something to do: an answer, a write to carry on, or the peer's end."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Incoming:
    """A frame that has arrived at a host: the request, and how to answer it (thread-safe, once, never blocks for long).

    `answer` of a gone peer is a no-op: a host never waits for a router. `cancelled` turns true when the router has given
    the frame up or is gone: it need not be computed, nor answered. `channel_id` tells channels apart within one host.
    """

    sequence: int
    attempt: int
    request: ExpertsRequest
    answer: Callable[[ExpertsAnswer], None] = field(compare=False)
    cancelled: Callable[[], bool] = field(default=_never, compare=False)
    channel_id: int = 0
