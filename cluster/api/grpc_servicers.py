"""What Serve's proxy is given as `grpc_servicer_functions`: our services, with cancellation that always arrives.

Serve (2.60) answers a stream from an async generator, and grpc closes none that is suspended in a `yield` when the client goes
away: about every second call that is cancelled while messages flow would run on in the replica to its end. Here the
generator is read by a task that never waits for the client, so it is suspended where a cancellation reaches the replica.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from cluster.api.proto.shoal.v1 import cluster_pb2_grpc, inference_pb2_grpc

StreamHandler = Callable[[Any, Any], AsyncGenerator[bytes, None]]


def add_inference(servicer: Any, server: Any) -> None:
    """Adds shoal.v1.Inference to Serve's gRPC server."""
    _add(inference_pb2_grpc.add_InferenceServicer_to_server, servicer, server)


def add_cluster(servicer: Any, server: Any) -> None:
    """Adds shoal.v1.Cluster to Serve's gRPC server."""
    _add(cluster_pb2_grpc.add_ClusterServicer_to_server, servicer, server)


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    """Serve's server makes its handlers by `service_handler_factory` while a service is added; one that has none is left alone."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is None:
        add(servicer, server)
        return

    def cancellable_factory(service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return cancellable(handler) if streaming_type.name == "UNARY_STREAM" else handler

    server.service_handler_factory = cancellable_factory
    try:
        add(servicer, server)
    finally:
        server.service_handler_factory = factory


def cancellable(handler: StreamHandler) -> Callable[[Any, Any], Any]:
    """The same handler in grpc.aio's writing style. It returns only when `handler` has ended: that one uses `context` to the last.

    Empty messages, by which a method ends a stream with a status, are not sent.
    """

    async def write_stream(request: Any, context: Any) -> None:
        # Unbounded as Serve's own stream to the proxy is; the bound is the answer's max_tokens.
        messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        reader = asyncio.create_task(_read(handler(request, context), messages))
        try:
            while (message := await messages.get()) is not None:
                if message:
                    await context.write(message)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    return write_stream


async def _read(stream: AsyncGenerator[bytes, None], messages: asyncio.Queue[bytes | None]) -> None:
    try:
        async for message in stream:
            messages.put_nowait(message)
    finally:
        messages.put_nowait(None)
