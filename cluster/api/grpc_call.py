"""One gRPC call as a method sees it: who calls, what its metadata asks for, and how it ends."""

from collections.abc import Iterable
from typing import Protocol

import grpc

from cluster.api.connection import REQUEST_ID, request_id_of
from cluster.api.errors import describe
from cluster.api.grpc_messages import Asked
from cluster.api.grpc_status import Metadata, error_metadata, text_of
from cluster.api.trace_context import TRACEPARENT, parse
from cluster.guard.guard import ANONYMOUS, Guard
from cluster.guard.keys import Scope

TIMEOUT = "x-request-timeout-s"


class Context(Protocol):
    """What is used of Serve's RayServegRPCContext, which is also in grpc.aio's own context."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the client sent beside the request."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """The call's status."""
        ...

    def set_details(self, details: str) -> None:
        """The status's sentence."""
        ...

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """What goes out beside the status; the last call counts."""
        ...


class GrpcCall:
    """Has its id and trace in the trailing metadata from the start. A deadline that is no number is NaN, which is refused by name."""

    def __init__(self, context: Context) -> None:
        self._context = context
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        self._authorization = metadata.get("authorization")
        self.request_id = request_id_of(metadata.get(REQUEST_ID))
        trace = parse(metadata.get(TRACEPARENT))
        self.asked = Asked(self.request_id, _seconds(metadata.get(TIMEOUT)), TIMEOUT, trace)
        self._echo: Metadata = [(REQUEST_ID, self.request_id)]
        if trace is not None:
            self._echo.append((TRACEPARENT, trace.as_text()))
        self._grant = ANONYMOUS
        context.set_trailing_metadata(list(self._echo))

    async def admit(self, guard: Guard | None, scope: Scope) -> None:
        """Raises Unauthenticated, PermissionDenied or TooManyRequests."""
        if guard is not None:
            self._grant = await guard.admit(self._authorization, scope)

    def check(self) -> None:
        """Raises PermissionDenied once the call's key was revoked."""
        self._grant.check()

    def fail(self, error: Exception) -> None:
        """Ends the call by the status that `error` is for a client."""
        problem = describe(error, self.request_id)
        self._context.set_code(problem.status.grpc)
        self._context.set_details(text_of(problem))
        self._context.set_trailing_metadata([*self._echo, *error_metadata(problem, self.request_id)])


def _seconds(given: str | None) -> float | None:
    try:
        return None if given is None else float(given)
    except ValueError:
        return float("nan")
