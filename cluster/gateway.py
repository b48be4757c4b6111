"""The front door of one application: HTTP and gRPC over one text service. Plain class; Serve makes a replica of it."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI

from cluster.api.control import ClusterControl
from cluster.api.fan import Generator
from cluster.api.grpc_call import Context
from cluster.api.grpc_health import GrpcHealth
from cluster.api.grpc_methods import GrpcMethods
from cluster.api.grpc_servicers import CLUSTER, INFERENCE
from cluster.api.http import http_app
from cluster.api.packing import Packed
from cluster.api.service import Limits, TextService
from cluster.config import DashboardSettings
from cluster.dashboard.page import add_dashboard
from cluster.guard.guard import Guard
from cluster.guard.guard_http import add_guard
from cluster.guard.http_guard import HttpRules

__all__ = ["ClusterControl", "Gateway", "Generator", "Limits", "TextService"]


class Gateway:
    """`serve.deployment(serve.ingress()(Gateway))` is the ingress deployment.

    Serve builds the HTTP application by `__serve_build_asgi_app__` once the constructor has returned, and calls gRPC
    methods by their names in the .proto.
    """

    def __init__(
        self,
        service: TextService,
        control: ClusterControl,
        is_ready: Callable[[], bool],
        dashboard: DashboardSettings | None = None,
        rules: HttpRules | None = None,
        grpc_guard: Guard | None = None,
    ) -> None:
        self._service = service
        self._dashboard = dashboard or DashboardSettings()
        self._control = control
        self._is_ready = is_ready
        self._rules = rules or HttpRules()
        self._grpc = GrpcMethods(service, control, grpc_guard)
        self._health = GrpcHealth(is_ready, (INFERENCE, CLUSTER))

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy sets the response's x-request-id itself, from the same header that we read.
        app = http_app(self._service, self._control, self._is_ready, echo_request_id=False, rules=self._rules)
        add_guard(app, self._rules.guard)
        add_dashboard(app, self._control, self._service.model_id, self._dashboard)
        return app

    async def Generate(self, request: Any, grpc_context: Context) -> AsyncGenerator[Packed, None]:
        """See inference.proto."""
        async with aclosing(self._grpc.generate(request, grpc_context)) as batches:
            async for batch in batches:
                yield Packed(batch)

    async def Chat(self, request: Any, grpc_context: Context) -> AsyncGenerator[Packed, None]:
        """See inference.proto."""
        async with aclosing(self._grpc.chat(request, grpc_context)) as batches:
            async for batch in batches:
                yield Packed(batch)

    async def GenerateBatch(self, request: AsyncIterator[Any], grpc_context: Context) -> AsyncGenerator[Packed, None]:
        """See inference.proto; `request` are the client's messages as they come."""
        async with aclosing(self._grpc.generate_batch(request, grpc_context)) as batches:
            async for batch in batches:
                yield Packed(batch)

    async def ListModels(self, request: Any, grpc_context: Context) -> Any:
        """See inference.proto."""
        return await self._grpc.list_models(request, grpc_context)

    async def Tokenize(self, request: Any, grpc_context: Context) -> Any:
        """See inference.proto."""
        return await self._grpc.tokenize(request, grpc_context)

    async def Detokenize(self, request: Any, grpc_context: Context) -> Any:
        """See inference.proto."""
        return await self._grpc.detokenize(request, grpc_context)

    async def GetPlacement(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.get_placement(request, grpc_context)

    async def GetLoad(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.get_load(request, grpc_context)

    async def WatchLoad(self, request: Any, grpc_context: Context) -> AsyncGenerator[Packed, None]:
        """See cluster.proto."""
        async with aclosing(self._grpc.watch_load(request, grpc_context)) as batches:
            async for batch in batches:
                yield Packed(batch)

    async def Rebalance(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.rebalance(request, grpc_context)

    async def Drain(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.drain(request, grpc_context)

    async def SetScaling(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.set_scaling(request, grpc_context)

    async def GetOperation(self, request: Any, grpc_context: Context) -> Any:
        """See cluster.proto."""
        return await self._grpc.get_operation(request, grpc_context)

    async def Check(self, request: Any, grpc_context: Context) -> Any:
        """See grpc.health.v1."""
        return await self._health.check(request, grpc_context)

    async def List(self, request: Any, grpc_context: Context) -> Any:
        """See grpc.health.v1."""
        return await self._health.list(request, grpc_context)

    async def Watch(self, request: Any, grpc_context: Context) -> AsyncGenerator[Packed, None]:
        """See grpc.health.v1."""
        async with aclosing(self._health.watch(request, grpc_context)) as batches:
            async for batch in batches:
                yield Packed(batch)
