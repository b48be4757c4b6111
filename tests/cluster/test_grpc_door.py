"""gRPC through Serve's own proxy: stock health and reflection clients, batches, cancellation, a thousand streams at once."""

import asyncio
import time
from collections import Counter

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.api.proto.shoal.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.conftest import App, Shoals
from tests.tiny_models import oracle, oracle_greedy, write_tiny

pytestmark = pytest.mark.cluster

NAME = "v2-lite-door"
MAX_RUNNING, MAX_WAITING = 16, 1000
MAX_GROWTH_BYTES = 600 << 20  # of all of Serve's and our processes together
IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def app(shoals: Shoals, tmp_path_factory):
    checkpoint = write_tiny("v2-lite", tmp_path_factory.mktemp("v2-lite"))
    router = {"router__replicas": 1, "router__max_running": MAX_RUNNING, "router__max_waiting": MAX_WAITING}
    with shoals.running(checkpoint, NAME, security__insecure=True, **router) as running:
        yield running


def request(num_tokens: int, **fields) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=IDS), sampling=sampling, **fields)


def expected(num_tokens: int) -> list[int]:
    """What transformers says."""
    return list(oracle_greedy(oracle("v2-lite"), IDS, num_tokens).token_ids)


def test_stock_health_and_reflection_clients(app: App):
    with grpc.insecure_channel(app.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "shoal.v1.Inference"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10, metadata=app.metadata)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30, metadata=app.metadata)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"shoal.v1.Inference", "shoal.v1.Cluster", "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol("shoal.v1.Inference")
        assert "GenerateBatch" in [method.name for service in file.service for method in service.method]


def test_errors_have_details_and_a_stranger_is_told_of_no_application(app: App):
    with grpc.insecure_channel(app.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        bad = inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.SamplingParams(top_p=2.0))
        trace = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"
        call = stub.Generate(bad, timeout=10, metadata=(*app.metadata, ("x-request-id", "mine"), ("traceparent", trace)))
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [detail.TypeName() for detail in rpc_status.from_call(call).details] == [
            "google.rpc.ErrorInfo",
            "google.rpc.RequestInfo",
            "google.rpc.BadRequest",
        ]
        trailing = dict(call.trailing_metadata())
        assert (trailing["x-request-id"], trailing["traceparent"]) == ("mine", trace)
        raw = channel.unary_stream("/shoal.v1.Inference/Generate")(b"\xff\xff", timeout=10, metadata=app.metadata)
        with pytest.raises(grpc.RpcError):
            list(raw)
        assert raw.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_batch_through_the_proxy(app: App):
    lengths = [1 + place % 12 for place in range(200)]
    requests = (inference_pb2.BatchRequest(id=f"r{place}", generate=request(length)) for place, length in enumerate(lengths))
    tokens: dict[str, list[int]] = {}
    num_last = 0
    with grpc.insecure_channel(app.grpc) as channel:
        for response in inference_pb2_grpc.InferenceStub(channel).GenerateBatch(requests, timeout=120, metadata=app.metadata):
            assert not response.HasField("error"), response
            tokens.setdefault(response.id, []).extend(response.delta.token_ids)
            num_last += response.last
    whole = expected(12)
    assert num_last == 200
    assert all(tokens[f"r{place}"] == whole[:length] for place, length in enumerate(lengths))


def num_sequences(app: App) -> float:
    """Running or waiting, by the routers' own reports."""
    return sum(router["num_running"] + router["num_waiting"] for router in app.view()["routers"])


def wait_until(condition) -> float:
    """Seconds until it held; fails after a minute."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + 60
        time.sleep(0.01)
    return time.monotonic() - begun


@pytest.mark.parametrize("how", ["cancel", "deadline", "batch"])
def test_what_a_client_gives_up_is_freed(app: App, how: str, record_property):
    """That the engine frees it in the step it hears of it is tested with the engine; here the whole way is timed, to be read."""
    with grpc.insecure_channel(app.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        if how == "deadline":
            call = stub.Generate(request(400), timeout=0.2, metadata=app.metadata)  # 400 tokens take longer on any machine
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            batch = iter([inference_pb2.BatchRequest(id="a", generate=request(400))])
            call = (
                stub.GenerateBatch(batch, metadata=app.metadata) if how == "batch" else stub.Generate(request(400), metadata=app.metadata)
            )
            next(call)
            call.cancel()
        total_s = wait_until(lambda: num_sequences(app) == 0)
    record_property(f"freed_after_{how}_s", round(total_s, 3))
    print(f"{how}: the coordinator knew {total_s:.2f} s later")


def memory_bytes() -> int:
    """Of every process that Ray runs for this session, without what they share."""
    total = 0
    for process in psutil.process_iter(["pid", "name"]):
        try:
            if process.info["name"].startswith("ray::") or "raylet" in process.info["name"]:
                total += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class Crowd:
    """Streams that are open at the same time, a hundred to a connection, and how each ended."""

    def __init__(self, app: App, num_streams: int, num_tokens: int) -> None:
        self._app, self._num_streams, self._num_tokens = app, num_streams, num_tokens
        self.calls: list[grpc.aio.UnaryStreamCall] = []
        self.ends: Counter[str] = Counter()
        self.tokens: list[list[int]] = []

    async def run(self, until=None) -> None:
        """To the end of all of them, or until `until` holds and they are cancelled."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(self._app.grpc, options=options) for _ in range(self._num_streams // 100)]
        try:
            stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
            streams = [asyncio.create_task(self._stream(stubs[place % len(stubs)])) for place in range(self._num_streams)]
            if until is not None:
                await asyncio.to_thread(wait_until, until)
                for call in self.calls:
                    call.cancel()
            await asyncio.gather(*streams)
        finally:
            for channel in channels:
                await channel.close()

    async def _stream(self, stub: inference_pb2_grpc.InferenceStub) -> None:
        call = stub.Generate(request(self._num_tokens), timeout=240, metadata=self._app.metadata)
        self.calls.append(call)
        tokens: list[int] = []
        end = "whole"
        try:
            async for delta in call:
                tokens.extend(delta.token_ids)
        except asyncio.CancelledError:
            end = "cancelled"
        except grpc.aio.AioRpcError as error:
            end = f"{error.code().name} {dict(error.trailing_metadata() or ()).get('shoal-error-kind')}"
        self.ends[end] += 1
        if end == "whole":
            self.tokens.append(tokens)


def test_a_thousand_streams_end_whole(app: App):
    num_tokens = 4
    before = memory_bytes()
    crowd = Crowd(app, 1000, num_tokens)
    asyncio.run(crowd.run())
    growth = memory_bytes() - before
    print(f"1,000 streams: {dict(crowd.ends)}, memory grew by {growth / 2**20:.0f} MiB")
    assert crowd.ends == {"whole": 1000}
    whole = expected(num_tokens)
    assert all(tokens == whole for tokens in crowd.tokens)
    assert growth < MAX_GROWTH_BYTES


def test_more_than_a_thousand_open_at_once_and_the_rest_refused(app: App):
    before = memory_bytes()
    crowd = Crowd(app, 1200, 400)
    most = 0.0

    def is_full() -> bool:
        nonlocal most
        most = max(most, num_sequences(app))
        return most >= MAX_WAITING and crowd.ends["RESOURCE_EXHAUSTED queue_full"] >= 20

    asyncio.run(crowd.run(is_full))
    growth = memory_bytes() - before
    print(f"{most:.0f} streams open at once: {dict(crowd.ends)}, memory grew by {growth / 2**20:.0f} MiB")
    assert set(crowd.ends) <= {"whole", "cancelled", "RESOURCE_EXHAUSTED queue_full"}
    assert crowd.ends.total() == 1200
    assert growth < MAX_GROWTH_BYTES
    wait_until(lambda: num_sequences(app) == 0)
    with grpc.insecure_channel(app.grpc) as channel:  # right afterwards
        deltas = inference_pb2_grpc.InferenceStub(channel).Generate(request(4), timeout=60, metadata=app.metadata)
        assert [token for delta in deltas for token in delta.token_ids] == expected(4)
