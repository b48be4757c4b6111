"""How a Problem is told over gRPC: a status, google.rpc's error details, and the same in plain metadata.

The details (https://google.aip.dev/193) are for clients with a library; the plain entries for everybody else.
"""

import math
import re

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.api.errors import INTERNAL, STATUSES, Problem, Status

DOMAIN = "shoal"
DETAILS = "grpc-status-details-bin"
KIND = "shoal-error-kind"
FIELD = "shoal-error-field"
RETRY_AFTER = "retry-after"
# The sentence goes out twice, once with up to three bytes for one; all metadata of a call together must stay below 8 KiB.
MAX_MESSAGE_BYTES = 900
MAX_FIELD_CHARS = 200
CODES = {code.value[0]: code for code in grpc.StatusCode}

Metadata = list[tuple[str, str | bytes]]

GATEWAY_LOST = Status(503, grpc.StatusCode.UNAVAILABLE, "server_error", {RETRY_AFTER: "1"})
# What Ray Serve itself answers with, where no method of ours did: its own words may hold a stack trace.
SERVES_OWN: dict[grpc.StatusCode, tuple[str, str, Status]] = {
    grpc.StatusCode.NOT_FOUND: (
        "application_not_found",
        "No such application is served here: name one in the metadata `application`.",
        Status(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    ),
    grpc.StatusCode.UNAVAILABLE: ("gateway_lost", "No gateway can take the call at the moment; send it again.", GATEWAY_LOST),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "queue_full",
        "The gateways have as many calls open as they take; send it again in a moment.",
        STATUSES["queue_full"],
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("deadline_exceeded", "The server's own limit on a call passed.", STATUSES["deadline_exceeded"]),
    grpc.StatusCode.CANCELLED: ("cancelled", "The call was cancelled.", STATUSES["cancelled"]),
}


def text_of(problem: Problem) -> str:
    """The problem's sentence in at most MAX_MESSAGE_BYTES of UTF-8."""
    raw = problem.message.encode(errors="replace")
    return problem.message if len(raw) <= MAX_MESSAGE_BYTES else raw[: MAX_MESSAGE_BYTES - 4].decode(errors="ignore") + " ..."


def retry_after_s(problem: Problem) -> float | None:
    """After how long sending the same again may help; None: it would not, or nobody knows."""
    try:
        given = float(problem.status.headers.get(RETRY_AFTER, "nan"))
    except ValueError:
        return None
    return given if math.isfinite(given) else None


def error_metadata(problem: Problem, request_id: str) -> Metadata:
    """What goes into the trailing metadata beside code and sentence."""
    metadata: Metadata = [(KIND, problem.kind)]
    field = _field(problem)
    if field is not None:
        metadata.append((FIELD, field))
    if RETRY_AFTER in problem.status.headers:
        metadata.append((RETRY_AFTER, problem.status.headers[RETRY_AFTER]))
    return [*metadata, (DETAILS, _details(problem, request_id).SerializeToString())]


def problem_of_serve(code: grpc.StatusCode, details: str) -> Problem:
    """What a status that Serve made up itself is for a client. `details` only tells a gateway that died from a fault of ours."""
    if code in SERVES_OWN:
        return Problem(SERVES_OWN[code][0], SERVES_OWN[code][1], None, SERVES_OWN[code][2])
    if re.search(r"\bactor\b.*\b(died|dead|unavailable)\b", details[:500], re.IGNORECASE | re.DOTALL):
        return Problem("gateway_lost", "The gateway that answered this call has ended; send it again.", None, GATEWAY_LOST)
    return Problem("internal", "The server failed to answer; its log says why.", None, INTERNAL)


def _details(problem: Problem, request_id: str) -> status_pb2.Status:
    status = status_pb2.Status(code=problem.status.grpc.value[0], message=text_of(problem))
    reason = re.sub(r"[^A-Z0-9_]", "_", problem.kind.upper())
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"kind": problem.kind}))
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    field = _field(problem)
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text_of(problem), reason=reason)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    delay_s = retry_after_s(problem)
    if delay_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(delay_s * 1e9))
        status.details.add().Pack(retry)
    return status


def _field(problem: Problem) -> str | None:
    """Only what metadata can carry."""
    if problem.field is None:
        return None
    return re.sub(r"[^!-~]", "?", problem.field[:MAX_FIELD_CHARS])
