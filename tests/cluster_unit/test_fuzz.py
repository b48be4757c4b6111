"""Ten thousand broken messages against a real front door: each is refused cleanly or is still a good one, and the door stands."""

import asyncio
import json
import logging
import random
import socket
from contextlib import asynccontextmanager

import grpc
import pytest
import uvicorn

from cluster.api.control import ClusterControl
from cluster.api.http import http_app
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2
from cluster.gateway import Gateway
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, StillCoordinator, make_service, says
from tests.cluster_unit.grpc_door import grpc_client
from tests.cluster_unit.mutations import broken_bytes, broken_json
from tests.model.tiny_tokenizer import write_byte_level

NUM_REFUSED_GRPC, NUM_REFUSED_HTTP = 7000, 3000
NUM_CLIENTS = 8
Code = grpc.StatusCode
CLEAN = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.DEADLINE_EXCEEDED)
CLEAN_NUMBERS = [code.value[0] for code in CLEAN]
KINDS = ("invalid_request", "model_not_found", "deadline_exceeded")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def no_errors(caplog):
    """A fault of ours that a client is told of as such is in the log."""
    with caplog.at_level(logging.ERROR):
        yield
    assert [record.getMessage() for record in caplog.records if record.name == "shoal"] == []


SAMPLING = inference_pb2.SamplingParams(
    temperature=0.5, top_p=0.9, top_k=5, seed=4, max_tokens=8, stop_token_ids=[7, 8], logit_bias={5: 1.0, 9: -2.0}, logprobs=2
)
GENERATE = inference_pb2.GenerateRequest(model=MODEL, text="hello", sampling=SAMPLING, stop=["end", "你"], n=2)
BY_IDS = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6, 300]), sampling=SAMPLING)
TURNS = [inference_pb2.ChatMessage(role=role, content="hello") for role in ("system", "user")]
CHAT = inference_pb2.ChatRequest(messages=TURNS, sampling=SAMPLING)
BATCH = [inference_pb2.BatchRequest(id="a", generate=GENERATE, timeout_s=5.0), inference_pb2.BatchRequest(id="b", chat=CHAT)]
GRPC_SEEDS = [
    ("Inference/Generate", "unary_stream", [GENERATE, BY_IDS]),
    ("Inference/Chat", "unary_stream", [CHAT]),
    ("Inference/GenerateBatch", "stream_stream", BATCH),
    ("Inference/Tokenize", "unary_unary", [inference_pb2.TokenizeRequest(model=MODEL, text="hello", add_special_tokens=True)]),
    ("Inference/Detokenize", "unary_unary", [inference_pb2.DetokenizeRequest(model=MODEL, token_ids=[5, 300, 7])]),
    ("Cluster/GetLoad", "unary_unary", [cluster_pb2.GetLoadRequest()]),
]


async def refusal_of(rpc, raw):
    """The status that one broken message is refused with, None where it is still a good one."""
    try:
        if isinstance(rpc, grpc.aio.UnaryUnaryMultiCallable):
            await rpc(raw, timeout=20)
            return None
        async for answer in rpc(iter([raw]), timeout=20) if isinstance(rpc, grpc.aio.StreamStreamMultiCallable) else rpc(raw, timeout=20):
            if isinstance(answer, inference_pb2.BatchResponse) and answer.HasField("error"):
                assert answer.error.code in CLEAN_NUMBERS, answer
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_broken_protobuf(tokenizer, no_errors):
    service, router = make_service(tokenizer, says([*tokenizer.encode("world"), 1]))
    draw = random.Random(5)
    others = [message.SerializeToString() for _, _, seeds in GRPC_SEEDS for message in seeds]
    num_refused = num_sent = 0

    async def attack(rpcs):
        nonlocal num_refused, num_sent
        while num_refused < NUM_REFUSED_GRPC:
            place = draw.randrange(len(GRPC_SEEDS))
            raw = broken_bytes(draw.choice(GRPC_SEEDS[place][2]).SerializeToString(), others, draw)
            num_sent += 1
            error = await refusal_of(rpcs[place], raw)
            if error is None:
                continue
            num_refused += 1
            assert error.code() in CLEAN, (GRPC_SEEDS[place][0], raw, error)
            trailing = dict(error.trailing_metadata())
            assert "grpc-status-details-bin" in trailing
            assert trailing["shoal-error-kind"] in KINDS

    async with grpc_client(Gateway(service, STILL, lambda: True)) as channel:
        reads = {"Inference/GenerateBatch": inference_pb2.BatchResponse.FromString}
        rpcs = [getattr(channel, kind)(f"/shoal.v1.{name}", response_deserializer=reads.get(name)) for name, kind, _ in GRPC_SEEDS]
        await asyncio.gather(*(attack(rpcs) for _ in range(NUM_CLIENTS)))
        answer = [
            inference_pb2.Delta.FromString(raw) async for raw in rpcs[0](inference_pb2.GenerateRequest(text="hello").SerializeToString())
        ]
    assert "".join(delta.text for delta in answer) == "world"
    assert num_sent < 10 * NUM_REFUSED_GRPC  # most are refused
    assert sorted(router.closed) == sorted(request.request_id for request in router.requests)


COMPLETION = {
    "model": MODEL,
    "prompt": "hello",
    "max_tokens": 8,
    "temperature": 0.5,
    "stop": ["end"],
    "n": 2,
    "logit_bias": {"5": 1.0},
    "logprobs": 2,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
MESSAGES = [{"role": "system", "content": "stop"}, {"role": "user", "content": "hello"}]
CHAT_BODY = {
    "model": MODEL,
    "messages": MESSAGES,
    "max_tokens": 8,
    "top_p": 0.5,
    "stream": False,
    "seed": 3,
    "tools": [TOOL],
    "response_format": FORM,
}
HTTP_SEEDS = [
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": [[5, 6], [7]], "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/chat/completions", CHAT_BODY),
    ("POST", "/v1/responses", {"model": MODEL, "input": "hello", "max_output_tokens": 8, "instructions": "stop"}),
    ("POST", "/tokenize", {"model": MODEL, "prompt": "hello", "add_special_tokens": True}),
    ("POST", "/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
    ("PATCH", "/cluster/scaling", {"router": {"min_replicas": 3, "max_replicas": 2}}),
]


class Settable(StillCoordinator):
    """Whose scaling can be asked for."""

    async def set_scaling(self, bounds):
        return {
            "id": "1",
            "kind": "scaling",
            "target": str(bounds),
            "state": "done",
            "detail": "",
            "started_unix_s": 0.0,
            "ended_unix_s": 0.0,
        }


async def http_answer(connection, method, path, body):
    """Status and body, over a connection that is kept."""
    reader, writer = connection
    head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    if "content-length" in headers:
        answer = await reader.readexactly(int(headers["content-length"]))
    else:
        answer = b""
        while size := int((await reader.readline()).strip(), 16):
            answer += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return int(lines[0].split()[1]), answer


@asynccontextmanager
async def http_door(service, control):
    server = uvicorn.Server(uvicorn.Config(http_app(service, control, lambda: True), log_level="critical", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:  # clients wait in its backlog until uvicorn is up
        serving = asyncio.create_task(server.serve([listening]))
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            await serving


async def test_broken_http(tokenizer, no_errors):
    service, router = make_service(tokenizer, says([*tokenizer.encode("world"), 1]))
    draw = random.Random(6)
    num_refused = num_sent = 0

    async def attack(address):
        nonlocal num_refused, num_sent
        connection = await asyncio.open_connection(*address)
        while num_refused < NUM_REFUSED_HTTP:
            method, path, good = draw.choice(HTTP_SEEDS)
            body = broken_json(good, draw)
            num_sent += 1
            status, answer = await http_answer(connection, method, path, body)
            if status < 300:
                continue
            num_refused += 1
            assert 400 <= status < 500, (path, body, answer)
            error = json.loads(answer)["error"]
            assert error["message"], (path, body, answer)
            assert error["code"], (path, body, answer)
            assert b"Traceback" not in answer
        connection[1].close()

    async with http_door(service, ClusterControl(Settable())) as address:
        await asyncio.gather(*(attack(address) for _ in range(NUM_CLIENTS)))
        connection = await asyncio.open_connection(*address)
        status, answer = await http_answer(connection, "POST", "/v1/completions", json.dumps({"model": MODEL, "prompt": "hello"}).encode())
        connection[1].close()
    assert (status, json.loads(answer)["choices"][0]["text"]) == (200, "world")
    assert num_sent < 10 * NUM_REFUSED_HTTP
    assert sorted(router.closed) == sorted(request.request_id for request in router.requests)
