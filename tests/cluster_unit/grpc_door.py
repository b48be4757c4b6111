"""A gateway behind Serve's own gRPC server class, without Ray: what Serve's proxy does to a call, done in one process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
from ray.serve._private.grpc_util import gRPCGenericServer
from ray.serve.grpc_util import RayServegRPCContext

from cluster.api import grpc_servicers
from cluster.gateway import Gateway

SERVICES = (
    grpc_servicers.add_inference,
    grpc_servicers.add_cluster,
    grpc_servicers.add_health,
    grpc_servicers.add_reflection,
)


class Serve:
    """Makes handlers as Serve's proxy does: the method by its name, its context taken over with every answer."""

    def __init__(self, gateway: Any) -> None:
        self._gateway = gateway

    def factory(self, service_method: str, streaming_type: Any) -> Any:
        name = service_method.rpartition("/")[2]

        async def single(request: Any, context: Any) -> bytes:
            mine = RayServegRPCContext(context)
            answer = await getattr(self._gateway, name)(request, grpc_context=mine)
            mine._set_on_grpc_context(context)
            return answer.SerializeToString()

        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            mine = RayServegRPCContext(context)
            async for item in getattr(self._gateway, name)(request, grpc_context=mine):
                mine._set_on_grpc_context(context)
                yield item.SerializeToString()

        return single if streaming_type.name == "UNARY_UNARY" else stream


@asynccontextmanager
async def grpc_door(gateway: Gateway) -> AsyncIterator[str]:
    """The address of a running server."""
    server = gRPCGenericServer(Serve(gateway).factory)
    for add in SERVICES:
        add(Mock(), server)  # as Serve does: its methods are replaced by the factory's
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def grpc_client(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of its own."""
    async with grpc_door(gateway) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel
