"""What clients see of gRPC on the wire: health, reflection, error details, ids and traces, broken messages, batches."""

import asyncio

import grpc
import msgpack
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.api.grpc_batch import Batch
from cluster.api.grpc_streams import MAX_UNREAD, conversing
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc
from cluster.gateway import Gateway
from model.tokenizer import Tokenizer
from router.errors import InvalidRequest, QueueFull
from router.request import Delta
from tests.cluster_unit.front_door import STILL, each, make_service, says
from tests.cluster_unit.grpc_door import grpc_client, grpc_door
from tests.model.tiny_tokenizer import write_byte_level

Code = grpc.StatusCode
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def make_gateway(tokenizer, script=None, is_ready=lambda: True):
    service, router = make_service(tokenizer, script or says([*tokenizer.encode("world"), 1]))
    return Gateway(service, STILL, is_ready), router


def generate(**fields):
    sampling = inference_pb2.SamplingParams(**fields.pop("sampling", {}))
    return inference_pb2.GenerateRequest(**{"text": "hello", **fields}, sampling=sampling)


def details_of(error):
    """The google.rpc details by their type's name."""
    found = {}
    for packed_detail in rpc_status.from_call(error).details:
        kind = getattr(error_details_pb2, packed_detail.TypeName().rpartition(".")[2])
        found[kind.DESCRIPTOR.name] = kind.FromString(packed_detail.value)
    return found


async def failure_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_a_bad_field_is_a_field_violation(tokenizer):
    gateway, _ = make_gateway(tokenizer)
    async with grpc_client(gateway) as channel:
        error = await failure_of(
            inference_pb2_grpc.InferenceStub(channel).Generate(
                generate(sampling={"temperature": -1.0}),
                metadata=(("x-request-id", "mine"), ("traceparent", TRACEPARENT)),
            )
        )
    assert error.code() is Code.INVALID_ARGUMENT
    details = details_of(error)
    assert [violation.field for violation in details["BadRequest"].field_violations] == ["sampling.temperature"]
    assert (details["ErrorInfo"].domain, details["ErrorInfo"].reason) == ("shoal", "INVALID_REQUEST")
    assert details["RequestInfo"].request_id == "mine"
    assert "RetryInfo" not in details
    trailing = dict(error.trailing_metadata())
    assert (trailing["x-request-id"], trailing["shoal-error-kind"]) == ("mine", "invalid_request")
    assert trailing["traceparent"] == TRACEPARENT


async def test_what_may_be_sent_again_says_when(tokenizer):
    gateway, _ = make_gateway(tokenizer, lambda _: [QueueFull("full " + "长" * 2000)])
    async with grpc_client(gateway) as channel:
        error = await failure_of(inference_pb2_grpc.InferenceStub(channel).Generate(generate()))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert details_of(error)["RetryInfo"].retry_delay.ToSeconds() == 1
    assert dict(error.trailing_metadata())["retry-after"] == "1"


class Broken:
    """Fails as a replica of Serve's may: outside of our methods, with a stack trace for words."""

    def __getattr__(self, name):
        if name in ("Generate", "ListModels"):
            raise RuntimeError("ray::ServeReplica:secret Traceback (most recent call last)")
        raise AttributeError(name)


async def test_no_stack_trace_crosses_the_wire():
    async with grpc_client(Broken()) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = await failure_of(stub.Generate(generate()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(inference_pb2.ListModelsRequest())
    for failure in (error, caught.value):
        assert failure.code() is Code.INTERNAL
        assert details_of(failure)["ErrorInfo"].reason == "INTERNAL"
        assert not any("secret" in str(part) or "Traceback" in str(part) for part in (failure.details(), failure.trailing_metadata()))


async def first_of(rpc, request):
    """What one raw request is answered with, whichever kind of call it is. Raises its status."""
    if isinstance(rpc, grpc.aio.UnaryUnaryMultiCallable):
        return await rpc(request)
    call = rpc(iter([request])) if isinstance(rpc, grpc.aio.StreamStreamMultiCallable) else rpc(request)
    return [answer async for answer in call]


async def test_messages_that_cannot_be_read(tokenizer):
    gateway, router = make_gateway(tokenizer)
    async with grpc_client(gateway) as channel:
        for method, call in (
            ("Inference/Generate", channel.unary_stream),
            ("Inference/GenerateBatch", channel.stream_stream),
            ("Inference/Tokenize", channel.unary_unary),
            ("Cluster/Drain", channel.unary_unary),
        ):
            rpc = call(f"/shoal.v1.{method}", request_serializer=None, response_deserializer=None)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await first_of(rpc, b"\xff\xff\xff")
            assert caught.value.code() is Code.INVALID_ARGUMENT, method
            assert details_of(caught.value)["ErrorInfo"].reason == "INVALID_REQUEST"
        answer = [delta async for delta in inference_pb2_grpc.InferenceStub(channel).Generate(generate())]
    assert "".join(delta.text for delta in answer) == "world"
    assert len(router.requests) == 1


async def test_health_for_stock_clients(tokenizer):
    is_ready = False
    gateway, _ = make_gateway(tokenizer, is_ready=lambda: is_ready)
    Health = health_pb2.HealthCheckResponse
    async with grpc_client(gateway) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="shoal.v1.Inference"))
        assert (await watch.read()).status == Health.NOT_SERVING
        is_ready = True
        assert (await watch.read()).status == Health.SERVING
        watch.cancel()
        for service in ("", "shoal.v1.Inference", "shoal.v1.Cluster"):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == Health.SERVING
        assert set((await stub.List(health_pb2.HealthListRequest())).statuses) == {"", "shoal.v1.Inference", "shoal.v1.Cluster"}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is Code.NOT_FOUND
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await unknown.read()).status == Health.SERVICE_UNKNOWN


async def test_reflection_for_stock_clients(tokenizer):
    gateway, _ = make_gateway(tokenizer)
    async with grpc_door(gateway) as address:

        def look():
            with grpc.insecure_channel(address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                names = set(database.get_services())
                file = database.FindFileContainingSymbol("shoal.v1.Inference")
                return names, {method.name for service in file.service for method in service.method}

        services, methods = await asyncio.to_thread(look)
        async with grpc.aio.insecure_channel(address) as channel:
            newer = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(
                iter([b"\x3a\x01*"])
            )  # list_services
            assert b"shoal.v1.Cluster" in await newer.read()
    assert {"shoal.v1.Inference", "shoal.v1.Cluster", "grpc.health.v1.Health"} <= services
    assert methods == {method.name for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods}


def batch_request(name, **fields):
    return inference_pb2.BatchRequest(id=name, generate=generate(**fields))


async def responses_of(stub, requests):
    """What a batch answers, by id."""
    by_id = {}
    async for response in stub.GenerateBatch(iter(requests)):
        by_id.setdefault(response.id, []).append(response)
    return by_id


async def test_a_batch_answers_each_request_by_its_id(tokenizer):
    gateway, router = make_gateway(tokenizer)
    requests = [batch_request(f"r{i}", n=1 + i % 2) for i in range(20)]
    chat = inference_pb2.ChatRequest(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
    requests.append(inference_pb2.BatchRequest(id="chat", chat=chat))
    requests.append(batch_request("bad", sampling={"top_p": 3.0}))
    requests.append(inference_pb2.BatchRequest(id="empty"))
    requests.append(inference_pb2.BatchRequest(id="late", generate=generate(), timeout_s=-1.0))
    requests.append(inference_pb2.BatchRequest(id="nobody", cancel=inference_pb2.CancelRequest()))
    async with grpc_client(gateway) as channel:
        by_id = await responses_of(inference_pb2_grpc.InferenceStub(channel), requests)
    assert "nobody" not in by_id
    for name, responses in by_id.items():
        assert [response.last for response in responses] == [False] * (len(responses) - 1) + [True], name
    for i in range(20):
        for index in range(1 + i % 2):
            assert "".join(response.delta.text for response in by_id[f"r{i}"] if response.delta.index == index) == "world"
    assert "".join(response.delta.text for response in by_id["chat"]) == "world"
    fields = {"bad": "sampling.top_p", "empty": "request", "late": "timeout_s"}
    for name, field in fields.items():
        (response,) = by_id[name]
        assert (response.error.code, response.error.kind, response.error.field) == (3, "invalid_request", field)
    assert len({request.request_id for request in router.requests}) == len(router.requests) == 31


class Told(list):
    """A list that counts what is put into it on a semaphore."""

    def __init__(self, semaphore):
        super().__init__()
        self.semaphore = semaphore

    def append(self, item):
        super().append(item)
        self.semaphore.release()


async def test_one_request_of_a_batch_is_cancelled_alone(tokenizer):
    never = asyncio.Event()
    gateway, router = make_gateway(tokenizer, lambda request: [Delta(request.request_id, (40,)), never])
    closed = asyncio.Semaphore(0)
    router.closed = Told(closed)

    async def talk(call):
        for name in ("a", "b"):
            await call.write(batch_request(name))
            assert (await call.read()).id == name
        await call.write(inference_pb2.BatchRequest(id="a", cancel=inference_pb2.CancelRequest()))
        response = await call.read()
        assert (response.id, response.error.kind, response.last) == ("a", "cancelled", True)
        assert len(router.closed) == 1
        await call.write(batch_request("a"))  # the id is free again
        assert (await call.read()).id == "a"

    async with grpc_client(gateway) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).GenerateBatch()
        await talk(call)
        call.cancel()
        async with asyncio.timeout(10):
            for _ in range(3):
                await closed.acquire()


async def test_an_id_that_is_taken_ends_the_batch(tokenizer):
    never = asyncio.Event()
    gateway, router = make_gateway(tokenizer, lambda request: [never])
    async with grpc_client(gateway) as channel:
        error = await failure_of(inference_pb2_grpc.InferenceStub(channel).GenerateBatch(iter([batch_request("a"), batch_request("a")])))
        assert error.code() is Code.INVALID_ARGUMENT
        assert [violation.field for violation in details_of(error)["BadRequest"].field_violations] == ["id"]
    assert len(router.closed) == len(router.requests)


async def settle():
    """Until every task that can run has."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_a_batch_reads_no_further_than_it_has_places():
    """A client that writes on is then stopped by flow control."""
    go, num_read = asyncio.Event(), 0

    async def requests():
        nonlocal num_read
        for i in range(100):
            num_read += 1
            yield batch_request(f"r{i}")

    async def answer(request, request_id):
        await go.wait()
        yield [inference_pb2.Delta(request_id=request_id, finish_reason=inference_pb2.FINISH_REASON_STOP)]

    responses = Batch(answer, "call", max_open=4).run(requests())
    first = asyncio.ensure_future(anext(responses))
    await settle()
    assert num_read == 5
    go.set()
    rest = [response.id for response in await first] + [response.id async for response in each(responses)]
    assert sorted(rest) == sorted(f"r{i}" for i in range(100))


async def test_a_batch_that_is_refused_ends_though_a_request_of_it_streams_on():
    said, taken = asyncio.Event(), asyncio.Event()

    async def requests():
        yield batch_request("a")
        await said.wait()
        yield batch_request("a")

    async def answer(request, request_id):
        for _ in range(1000):
            yield [inference_pb2.Delta(request_id=request_id)]
            said.set()
            await asyncio.sleep(0)
        await taken.wait()

    seen = []

    async def read():
        async for responses in Batch(answer, "call").run(requests()):
            seen.extend(responses)
            await asyncio.sleep(0.01)  # the reader rests, and finds the end among other things

    with pytest.raises(InvalidRequest, match="open on this call"):
        await asyncio.wait_for(read(), 20)
    assert seen
    assert None not in seen


async def test_a_request_that_is_cancelled_before_it_has_begun_ends_all_the_same():
    async def requests():
        yield batch_request("a")
        yield inference_pb2.BatchRequest(id="a", cancel=inference_pb2.CancelRequest())

    async def answer(request, request_id):
        await asyncio.Event().wait()
        yield []

    async with asyncio.timeout(20):
        responses = [response async for response in each(Batch(answer, "call").run(requests()))]
    assert [(response.id, response.error.kind, response.last) for response in responses] == [("a", "cancelled", True)]


class SlowClient:
    """A call whose client reads when told to."""

    def __init__(self):
        self.reads, self.written = asyncio.Semaphore(0), 0

    async def write(self, message):
        await self.reads.acquire()
        self.written += 1

    def code(self):
        return 0


async def test_no_request_is_taken_while_answers_wait_for_the_client():
    num_read = 0

    async def requests():
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield b"request"

    async def handler(intake, context):
        async for _ in intake:
            yield msgpack.packb([b"answer"] * 100)

    client = SlowClient()
    call = asyncio.create_task(conversing(handler)(requests(), client))
    await settle()
    assert num_read * 100 <= MAX_UNREAD + 300
    for _ in range(100 * 100):
        client.reads.release()
    await call
    assert (num_read, client.written) == (100, 100 * 100)


async def test_watching_streams_until_it_is_cancelled(tokenizer):
    gateway, _ = make_gateway(tokenizer)
    async with grpc_client(gateway) as channel:
        loads = channel.unary_stream(
            "/shoal.v1.Cluster/WatchLoad",
            request_serializer=cluster_pb2.WatchLoadRequest.SerializeToString,
            response_deserializer=cluster_pb2.Load.FromString,
        )(cluster_pb2.WatchLoadRequest(interval_s=0.1))
        assert await loads.read() == await loads.read()
        loads.cancel()
