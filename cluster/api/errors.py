"""What went wrong, in the words of HTTP and of gRPC: one table for both.

ApiError (a ClusterError)
├── ModelNotFound         the name is not of a model that is served
├── TextNotSupported      the checkpoint has no tokenizer: token ids only
├── NotReady              the gateway has no complete placement map yet
├── CoordinatorAway       the Coordinator does not answer in time
└── RequestRefused        a router's Failure, with its kind
"""

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import grpc

from cluster.errors import ClusterError
from model.errors import ModelError
from router.errors import RouterError
from router.request import Failure

logger = logging.getLogger("shoal")


class ApiError(ClusterError):
    """`field` names the part of the request that is at fault, if one is."""

    kind = "internal"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelNotFound(ApiError):
    """Names the model that is served."""

    kind = "model_not_found"


class TextNotSupported(ApiError):
    """Says what to send instead."""

    kind = "no_tokenizer"


class NotReady(ApiError):
    """Says to wait."""

    kind = "not_ready"


class CoordinatorAway(ApiError):
    """Says that asking again is safe."""

    kind = "coordinator_away"


class RequestRefused(ApiError):
    """Carries a router's own kind, sentence and field."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, failure.field)
        self.kind = failure.kind


@dataclass(frozen=True)
class Status:
    """One kind of error as clients see it. `type` is OpenAI's coarse word; its clients retry by HTTP status and headers."""

    http: int
    grpc: grpc.StatusCode
    type: str
    headers: Mapping[str, str] = field(default_factory=dict)


Code = grpc.StatusCode
_INVALID = "invalid_request_error"
_RETRY = {"retry-after": "1"}
# A deadline is the client's own word: to send the request again would only take as long again.
_NO_RETRY = {"x-should-retry": "false"}

INTERNAL = Status(500, Code.INTERNAL, "server_error")
STATUSES: Mapping[str, Status] = {
    "invalid_request": Status(400, Code.INVALID_ARGUMENT, _INVALID),
    "no_chat_template": Status(400, Code.FAILED_PRECONDITION, _INVALID),
    "no_tokenizer": Status(400, Code.FAILED_PRECONDITION, _INVALID),
    "model_not_found": Status(404, Code.NOT_FOUND, _INVALID),
    "bad_bounds": Status(400, Code.INVALID_ARGUMENT, _INVALID),
    "unknown_host": Status(404, Code.NOT_FOUND, _INVALID),
    "unknown_operation": Status(404, Code.NOT_FOUND, _INVALID),
    "not_found": Status(404, Code.NOT_FOUND, _INVALID),
    "method_not_allowed": Status(405, Code.UNIMPLEMENTED, _INVALID),
    "deadline_exceeded": Status(408, Code.DEADLINE_EXCEEDED, "timeout_error", _NO_RETRY),
    "queue_full": Status(429, Code.RESOURCE_EXHAUSTED, "rate_limit_error", _RETRY),
    "unauthenticated": Status(401, Code.UNAUTHENTICATED, "authentication_error"),
    "permission_denied": Status(403, Code.PERMISSION_DENIED, "permission_error"),
    "rate_limited": Status(429, Code.RESOURCE_EXHAUSTED, "rate_limit_error"),
    "body_too_large": Status(413, Code.RESOURCE_EXHAUSTED, _INVALID),
    "body_too_slow": Status(408, Code.DEADLINE_EXCEEDED, "timeout_error", _NO_RETRY),
    "cancelled": Status(499, Code.CANCELLED, _INVALID),
    "internal": INTERNAL,
    "experts_unavailable": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "no_router": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "not_ready": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "coordinator_away": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "coordinator_outranked": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "poisoned": Status(500, Code.INTERNAL, "server_error", _NO_RETRY),
    "channel_refused": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "channel_error": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "channel_closed": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
    "channel_full": Status(503, Code.UNAVAILABLE, "server_error", _RETRY),
}
MAX_MESSAGE = 1000  # characters; gRPC carries the sentence in a header


@dataclass(frozen=True)
class Problem:
    """An error ready to be told."""

    kind: str
    message: str
    field: str | None
    status: Status

    def openai_body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error body, with our kind as its code."""
        return {"error": {"message": self.message, "type": self.status.type, "param": self.field, "code": self.kind}}


def place_of(error: BaseException) -> str:
    """Types and frames of an error and of what caused it. Never its words: they may quote what a client sent."""
    lines = [type(error).__name__, "\nTraceback (most recent call last):\n", *traceback.format_tb(error.__traceback__)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(lines) + ("" if cause is None else f"caused by {place_of(cause)}")


def describe(error: Exception, request_id: str) -> Problem:
    """The problem that `error` is for a client. What has no row in the table is ours: logged by its place, told as an id only."""
    kind = error.kind if isinstance(error, RouterError | ModelError | ClusterError) else None
    status = STATUSES.get(kind or "", INTERNAL)
    if kind is None or status is INTERNAL:
        logger.error("request %s failed: %s", request_id, place_of(error))
        return Problem("internal", f"The server failed to answer request {request_id}; its log says why.", None, INTERNAL)
    own = getattr(error, "headers", None)
    if own:
        status = replace(status, headers={**status.headers, **own})
    message = str(error)
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + " ..."
    return Problem(kind, message, getattr(error, "field", None), status)
