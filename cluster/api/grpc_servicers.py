"""What Serve's proxy is given as `grpc_servicer_functions`: our services, grpc.health.v1, and reflection over all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.api.grpc_streams import cancellable, conversing, forgiving, unary
from cluster.api.proto.shoal.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name
# The two versions of the protocol differ in their name only, and clients ask for the newer one first.
REFLECTION = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
WRAPPERS: Mapping[str, Callable[[Any], Any]] = {"UNARY_UNARY": unary, "UNARY_STREAM": cancellable, "STREAM_STREAM": conversing}


def add_inference(servicer: Any, server: Any) -> None:
    """Adds shoal.v1.Inference to Serve's gRPC server."""
    _add(inference_pb2_grpc.add_InferenceServicer_to_server, servicer, server)


def add_cluster(servicer: Any, server: Any) -> None:
    """Adds shoal.v1.Cluster to Serve's gRPC server."""
    _add(cluster_pb2_grpc.add_ClusterServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """Adds grpc.health.v1.Health, answered by the gateways as our own services are."""
    _add(health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


def add_reflection(servicer: Any, server: Any) -> None:  # noqa: ARG001 - Serve's signature
    """Adds server reflection, answered by the proxy itself."""
    answer = reflection.aio.ReflectionServicer((INFERENCE, CLUSTER, HEALTH, reflection.SERVICE_NAME)).ServerReflectionInfo
    handler = grpc.stream_stream_rpc_method_handler(
        answer,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in REFLECTION:
        if hasattr(server, "add_passthrough_service"):
            server.add_passthrough_service(service)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),))


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    """Serve's server makes its handlers by `service_handler_factory` while a service is added; one that has none is left alone."""
    factory = getattr(server, "service_handler_factory", None)
    if factory is None:
        add(servicer, server)
        return

    def safe_factory(service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        wrap = WRAPPERS.get(streaming_type.name)
        return handler if wrap is None else wrap(handler)

    server.service_handler_factory = safe_factory
    try:
        add(servicer, _Forgiving(server))
    finally:
        server.service_handler_factory = factory


class _Forgiving:
    """A server as generated code sees it, whose messages never fail to parse."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Left out: the other call brings the same handlers by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Adds them for both kinds of look-up."""
        safe = {name: handler._replace(request_deserializer=forgiving(handler.request_deserializer)) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, safe),))
        self._server.add_registered_method_handlers(service, safe)
