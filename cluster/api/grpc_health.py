"""grpc.health.v1, the standard's own health service: whether this gateway can answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any

from grpc_health.v1 import health_pb2

from cluster.api.errors import ApiError
from cluster.api.grpc_call import Context, GrpcCall

Status = health_pb2.HealthCheckResponse
WHOLE_SERVER = ""
POLL_S = 0.5
Statuses = AsyncGenerator[list[Any], None]


class ServiceUnknown(ApiError):
    """Names the service that was asked after."""

    kind = "not_found"


class GrpcHealth:
    """All services stand and fall together: with a router that has a complete map. No key is asked for."""

    def __init__(self, is_ready: Callable[[], bool], services: Collection[str]) -> None:
        self._is_ready = is_ready
        self._services = (WHOLE_SERVER, *services)

    async def check(self, request: Any, context: Context) -> Any:
        """HealthCheckRequest -> HealthCheckResponse; NOT_FOUND for a service that is none of ours."""
        if request.service not in self._services:
            GrpcCall(context).fail(ServiceUnknown(f"There is no service {request.service[:100]!r} here.", "service"))
            return Status()
        return self._response()

    async def list(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """HealthListRequest -> HealthListResponse."""
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, self._response()))

    async def watch(self, request: Any, context: Context) -> Statuses:  # noqa: ARG002 - it has no failure to tell
        """HealthCheckRequest -> HealthCheckResponses, one at once and one for every change, without end."""
        if request.service not in self._services:
            yield [Status(status=Status.SERVICE_UNKNOWN)]
            await asyncio.Event().wait()  # as the standard has it: a service may yet come
        told = None
        while True:
            response = self._response()
            if response != told:
                told = response
                yield [response]
            await asyncio.sleep(POLL_S)

    def _response(self) -> Any:
        return Status(status=Status.SERVING if self._is_ready() else Status.NOT_SERVING)
