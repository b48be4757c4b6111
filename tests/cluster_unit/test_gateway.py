import asyncio
import inspect
from types import SimpleNamespace

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2

from actors.exchange import Registry
from cluster.api import grpc_servicers
from cluster.api.grpc_streams import cancellable
from cluster.api.packing import Packed
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc
from cluster.gateway import Gateway
from cluster.gateway_replica import GatewayReplica
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, FakeContext, make_service, says
from tests.model.tiny_tokenizer import write_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def make_gateway(tokenizer, text="world"):
    service, router = make_service(tokenizer, says([*tokenizer.encode(text), 1]))
    return Gateway(service, STILL, lambda: True), router


async def test_one_class_speaks_both_protocols(tokenizer):
    gateway, _ = make_gateway(tokenizer)
    batches = [batch async for batch in gateway.Generate(inference_pb2.GenerateRequest(text="hello"), FakeContext())]
    deltas = [delta for batch in batches for delta in batch.messages]
    assert "".join(delta.text for delta in deltas) == "world"
    app = gateway.__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hello"})
    assert answer.json()["choices"][0]["text"] == "world"


def test_a_gateway_passes_an_operators_bounds_on_to_serve():
    gateway = object.__new__(GatewayReplica)
    gateway._registry = Registry((), scaling={"scaling_max": 3.0, "scaling_version": 1e9})
    assert gateway.record_autoscaling_stats() == {"scaling_max": 3.0, "scaling_version": 1e9}


def test_every_rpc_is_a_method_of_its_kind():
    """Serve calls by name, passes the context by the name `grpc_context`, and wants generators where the answer streams."""
    for file in (inference_pb2, cluster_pb2, health_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for rpc in service.methods:
                method = getattr(Gateway, rpc.name)
                assert list(inspect.signature(method).parameters) == ["self", "request", "grpc_context"]
                assert inspect.isasyncgenfunction(method) == rpc.server_streaming
                assert inspect.iscoroutinefunction(method) != rpc.server_streaming


async def test_closing_a_grpc_stream_cancels_at_once(tokenizer):
    gateway, router = make_gateway(tokenizer, "hello world and so on")
    stream = gateway.Generate(inference_pb2.GenerateRequest(text="hello"), FakeContext())
    await anext(stream)
    await stream.aclose()
    assert len(router.closed) == 1


class ServeLike:
    """Serve's gRPC server as far as servicer functions see it: it replaces every handler by one of its factory's."""

    def __init__(self, stream):
        self.service_handler_factory = lambda service_method, streaming_type: stream
        self.handlers = {}

    def add_generic_rpc_handlers(self, handlers):
        pass

    def add_registered_method_handlers(self, service, handlers):
        for name in handlers:
            kind = SimpleNamespace(name="UNARY_STREAM" if name in ("Generate", "Chat") else "UNARY_UNARY")
            self.handlers[name] = self.service_handler_factory(service_method=f"/{service}/{name}", streaming_type=kind)


async def run_server(handler):
    """A real grpc.aio server whose Generate is `handler` on raw bytes."""
    server = grpc.aio.server()
    rpc = grpc.unary_stream_rpc_method_handler(handler, request_deserializer=None, response_serializer=None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shoal.v1.Inference", {"Generate": rpc}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{port}")


def test_every_kind_of_call_is_wrapped():
    def stream(request, context):
        raise NotImplementedError

    server = ServeLike(stream)
    factory = server.service_handler_factory
    grpc_servicers.add_inference(object.__new__(inference_pb2_grpc.InferenceServicer), server)
    assert server.service_handler_factory is factory
    assert stream not in server.handlers.values()
    assert all(inspect.iscoroutinefunction(handler) for handler in server.handlers.values())


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
async def test_cancellation_always_arrives(pause_s):
    """Clients leave while messages flow; each time the stream behind must be cancelled where it waits, before the call is over."""
    ended, alive = [], asyncio.Semaphore(0)

    async def stream(request, context):
        try:
            while True:
                yield Packed([inference_pb2.Delta(text="x")]).SerializeToString()
                await asyncio.sleep(0.002)
        except BaseException as error:
            ended.append(type(error))
            context.peer()  # as Serve does for its log: fatal once the call is over
            raise
        finally:
            alive.release()

    server, channel = await run_server(cancellable(stream))
    async with channel:

        async def leave_early():
            call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest())
            seen = 0
            async for _ in call:
                seen += 1
                if seen == 5:
                    await asyncio.sleep(pause_s)
                    call.cancel()
                    break

        await asyncio.gather(*(leave_early() for _ in range(20)))
        for _ in range(20):
            await asyncio.wait_for(alive.acquire(), 10)
    await server.stop(None)
    assert ended == [asyncio.CancelledError] * 20


async def test_statuses_pass_and_empty_messages_do_not():
    async def stream(request, context):
        yield Packed([inference_pb2.Delta(text="x")]).SerializeToString()
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details("no router")
        context.set_trailing_metadata([("shoal-error-kind", "no_router")])
        yield Packed([inference_pb2.Delta()]).SerializeToString()

    server, channel = await run_server(cancellable(stream))
    async with channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest())
        assert (await call.read()).text == "x"
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "no router"
        assert dict(await call.trailing_metadata())["shoal-error-kind"] == "no_router"
    await server.stop(None)
