"""Errors of the router package, one tree.

RouterError
├── RequestError            one request is at fault or has met a limit; the others go on
│   ├── InvalidRequest      a field is wrong: names it
│   │   └── NoTokenizer     a constraint on the text of an answer, where only token ids are known
│   ├── QueueFull           the waiting queue is at its limit; retry later
│   ├── DeadlineExceeded    the request's own deadline passed
│   └── RequestCancelled    the client went away
├── ExpertsUnavailable      no ready replica of an expert answered before the deadline of a step
│   └── BatchAtFault        hosts answered this very batch with an error, one after another
│       └── PoisonedBatch   hosts died of it, one after another
└── ChannelError            a channel cannot carry on
    ├── ChannelClosed       the peer is gone or closed it
    │   └── ChannelRefused  nobody listens at its address: its process has ended
    ├── ChannelFull         the channel's buffers are all in use
    ├── FrameError          a frame is truncated, corrupted or not of our protocol
    └── HandshakeError      the peer did not prove that it knows the cluster's secret
"""


class RouterError(Exception):
    """Base of the tree. `kind` is stable: metrics, HTTP and gRPC show it."""

    kind = "router_error"


class RequestError(RouterError):
    """One request fails; nothing else does."""

    kind = "request_error"


class InvalidRequest(RequestError):
    """`field` names what is wrong, the message says what to do."""

    kind = "invalid_request"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NoTokenizer(InvalidRequest):
    """The checkpoint has no tokenizer: the text of its tokens, which the field is about, is not known."""

    kind = "no_tokenizer"


class QueueFull(RequestError):
    """The waiting queue is at its limit; the client should retry after a while."""

    kind = "queue_full"


class DeadlineExceeded(RequestError):
    """The request's deadline passed before it finished."""

    kind = "deadline_exceeded"


class RequestCancelled(RequestError):
    """The client went away."""

    kind = "cancelled"


class ExpertsUnavailable(RouterError):
    """Names the experts that no ready replica answered for in time."""

    kind = "experts_unavailable"


class BatchAtFault(ExpertsUnavailable):
    """The batch itself is what fails. Whoever put several requests into it should try each of them alone, and none a third time."""


class PoisonedBatch(BatchAtFault):
    """Hosts died while they had the batch: of a single request it is the end."""

    kind = "poisoned"


class ChannelError(RouterError):
    """A channel cannot carry on."""

    kind = "channel_error"


class ChannelClosed(ChannelError):
    """The peer is gone or closed the channel."""

    kind = "channel_closed"


class ChannelRefused(ChannelClosed):
    """Nobody listens at the peer's address any more: its process has ended."""

    kind = "channel_refused"


class ChannelFull(ChannelError):
    """The channel's buffers are all in use."""

    kind = "channel_full"


class FrameError(ChannelError):
    """A frame is truncated, corrupted or not of our protocol."""

    kind = "bad_frame"


class HandshakeError(ChannelError):
    """The peer did not prove that it knows the cluster's secret."""

    kind = "handshake_failed"
