import asyncio
import itertools
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from cluster.api.control import ClusterControl
from cluster.api.grpc_methods import GrpcMethods
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2
from cluster.api.service import Limits
from model.tokenizer import Tokenizer
from router.errors import ExpertsUnavailable, QueueFull
from router.request import Delta, Failure
from tests.cluster_unit.front_door import MODEL, STILL, FakeContext, StillCoordinator, each, make_service, says
from tests.model.tiny_tokenizer import write_byte_fallback, write_byte_level

Code = grpc.StatusCode
ROOT = Path(__file__).parents[2]
PROTO = Path("cluster/api/proto/shoal/v1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def generate_request(**fields):
    if "token_ids" not in fields:
        fields.setdefault("text", "hello")
    sampling = inference_pb2.SamplingParams(**fields.pop("sampling", {}))
    return inference_pb2.GenerateRequest(sampling=sampling, **fields)


def chat_request(*messages, **fields):
    return inference_pb2.ChatRequest(messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in messages], **fields)


async def stream_of(service, request, metadata=()):
    context = FakeContext(metadata)
    methods = GrpcMethods(service, STILL)
    method = methods.chat if isinstance(request, inference_pb2.ChatRequest) else methods.generate
    return [message async for message in each(method(request, context))], context


async def test_generate(tokenizer):
    ids = tokenizer.encode("hello 你好")
    service, router = make_service(tokenizer, says([*ids, 1]))
    request = generate_request(n=2, sampling={"seed": 4, "max_tokens": 40, "logprobs": 1, "prompt_logprobs": 0}, stop=["zzz"])
    deltas, context = await stream_of(service, request, [("x-request-id", "mine")])
    assert context.code is None
    assert context.trailing == {"x-request-id": "mine"}  # no traceparent where none was sent
    for index in (0, 1):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == "hello 你好"
        assert [token for delta in mine for token in delta.token_ids] == [*ids, 1]
        logprobs = [entry for delta in mine for entry in delta.logprobs]
        assert b"".join(entry.chosen.bytes for entry in logprobs).startswith("hello 你好".encode())
        assert [len(entry.top) for entry in logprobs] == [1] * (len(ids) + 1)
        assert len(mine[0].prompt_logprobs) == 1
        assert not mine[0].prompt_logprobs[0].HasField("chosen")
        assert mine[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
        assert (mine[-1].usage.prompt_tokens, mine[-1].usage.completion_tokens) == (1, len(ids) + 1)
        assert mine[-1].timing.total_s >= mine[-1].timing.first_token_s >= 0
        assert not any(delta.finish_reason for delta in mine[:-1])
    assert [request.sampling.seed for request in router.requests] == [4, 5]


async def test_every_parameter_reaches_the_sampler(tokenizer):
    service, router = make_service(tokenizer, says([5]))
    given = {
        "temperature": 0.0,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 0,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "logprobs": 0,
        "prompt_logprobs": 2,
        "logit_bias": {5: 1.0},
    }
    constraints = {descriptor.name for descriptor in inference_pb2.SamplingParams.DESCRIPTOR.oneofs_by_name["constraint"].fields}
    assert set(given) | constraints == {descriptor.name for descriptor in inference_pb2.SamplingParams.DESCRIPTOR.fields}
    await stream_of(service, generate_request(token_ids=inference_pb2.TokenIds(ids=[5, 6]), sampling=given))
    assert router.requests[0].sampling.model_dump() == given | {"stop_token_ids": (7,), "constraint": None}
    assert router.requests[0].prompt_token_ids == (5, 6)


CONSTRAINTS = [
    ({"json_schema": '{"type": "object"}'}, ("json_schema", '{"type": "object"}')),
    ({"json_object": inference_pb2.AnyJsonObject()}, ("json_object", "")),
    ({"regex": "[a-z]+"}, ("regex", "[a-z]+")),
    ({"choice": inference_pb2.Choices(choices=["yes", "no"])}, ("choice", '["yes", "no"]')),
    ({"grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
]


@pytest.mark.parametrize(("given", "expected"), CONSTRAINTS, ids=[next(iter(given)) for given, _ in CONSTRAINTS])
async def test_a_constraint_reaches_the_router(tokenizer, given, expected):
    service, router = make_service(tokenizer, says([5]))
    await stream_of(service, generate_request(sampling=given))
    constraint = router.requests[0].sampling.constraint
    assert (constraint.kind, constraint.value) == expected


async def test_chat(tokenizer):
    service, router = make_service(tokenizer, says([*tokenizer.encode("world"), 1]))
    deltas, _ = await stream_of(service, chat_request(("system", "stop"), ("user", "hello")))
    assert "".join(delta.text for delta in deltas) == "world"
    expected = tokenizer.chat([{"role": "system", "content": "stop"}, {"role": "user", "content": "hello"}])
    assert router.requests[0].prompt_token_ids == expected
    assert router.requests[0].sampling.max_tokens == 64 - len(expected)


PARAMETERS = '{"type": "object", "properties": {"a": {"type": "string"}}}'
TOOL = inference_pb2.Tool(name="look", description="Looks.", parameters=PARAMETERS)


def say(tokenizer, text):
    return says([*tokenizer.encode(text, add_special_tokens=False), 1])


async def test_a_chat_takes_reasoning_and_calls_apart(tokenizer):
    text = '<think>hm</think>well <tool_call>{"name": "look", "arguments": {"a": "b"}}</tool_call>'
    service, router = make_service(tokenizer, say(tokenizer, text), max_model_len=1024)
    deltas, _ = await stream_of(service, chat_request(("user", "hello"), tools=[TOOL]))
    assert "".join(delta.reasoning for delta in deltas) == "hm"
    assert "".join(delta.text for delta in deltas) == "well"
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert (pieces[0].name, pieces[0].id != "", {piece.index for piece in pieces}) == ("look", True, {0})
    assert not any(piece.name or piece.id for piece in pieces[1:])
    assert json.loads("".join(piece.arguments for piece in pieces)) == {"a": "b"}
    assert deltas[-1].finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS
    assert [token for delta in deltas for token in delta.token_ids] == [*tokenizer.encode(text, add_special_tokens=False), 1]
    assert router.requests[0].sampling.constraint is None


async def test_a_forced_call_is_held_to_its_parameters(tokenizer):
    service, router = make_service(tokenizer, say(tokenizer, '{"a": "b"}'), max_model_len=1024)
    choice = inference_pb2.ToolChoice(function="look")
    deltas, _ = await stream_of(service, chat_request(("user", "hello"), tools=[TOOL], tool_choice=choice))
    constraint = router.requests[0].sampling.constraint
    assert (constraint.kind, json.loads(constraint.value)) == ("json_schema", json.loads(PARAMETERS))
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert (pieces[0].name, "".join(piece.arguments for piece in pieces)) == ("look", '{"a": "b"}')
    assert "".join(delta.text for delta in deltas) == ""


async def test_earlier_calls_reach_the_chat_template(tokenizer):
    service, router = make_service(tokenizer, say(tokenizer, "world"), max_model_len=1024)
    call = inference_pb2.ToolCall(id="c", name="look", arguments='{"a": "b"}')
    messages = [
        inference_pb2.ChatMessage(role="user", content="hello"),
        inference_pb2.ChatMessage(role="assistant", tool_calls=[call]),
        inference_pb2.ChatMessage(role="tool", content="seen", tool_call_id="c"),
    ]
    _, context = await stream_of(service, inference_pb2.ChatRequest(messages=messages[:1], tools=[TOOL]))
    assert context.code is None
    bad = [*messages[:1], inference_pb2.ChatMessage(role="user", content="x", tool_call_id="c")]
    _, context = await stream_of(service, inference_pb2.ChatRequest(messages=bad))
    assert context.trailing["shoal-error-field"] == "messages[1].tool_call_id"
    assert len(router.requests) == 1


TOKENS = inference_pb2.TokenIds
TOOLS = [
    ({"tools": [inference_pb2.Tool(name="a b")]}, "tools[0].name"),
    ({"tools": [inference_pb2.Tool(name="a", parameters="{")]}, "tools[0].parameters"),
    ({"tools": [inference_pb2.Tool(name="a", parameters='"x"')]}, "tools[0].parameters"),
    ({"tools": [inference_pb2.Tool(name="a", parameters='{"type": "string"}')]}, "tools[0].parameters"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": inference_pb2.ToolChoice(mode=inference_pb2.TOOL_MODE_REQUIRED)}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": inference_pb2.ToolChoice(function="other")}, "tool_choice"),
]
BAD = [
    *((chat_request(("user", "x"), **fields), field) for fields, field in TOOLS),
    (generate_request(sampling={"temperature": -1.0}), "sampling.temperature"),
    (generate_request(sampling={"temperature": float("nan")}), "sampling.temperature"),
    (generate_request(sampling={"top_p": 2.0}), "sampling.top_p"),
    (generate_request(sampling={"max_tokens": 0}), "sampling.max_tokens"),
    (generate_request(sampling={"max_tokens": 64}), "sampling.max_tokens"),
    (generate_request(sampling={"logit_bias": {400: 1.0}}), "sampling.logit_bias"),
    (generate_request(sampling={"stop_token_ids": [400]}), "sampling.stop_token_ids"),
    (generate_request(text=""), "text"),
    (inference_pb2.GenerateRequest(), "text"),
    (inference_pb2.GenerateRequest(token_ids=TOKENS()), "token_ids.ids"),
    (inference_pb2.GenerateRequest(token_ids=TOKENS(ids=[400])), "token_ids.ids"),
    (inference_pb2.GenerateRequest(token_ids=TOKENS(ids=[5] * 64)), "token_ids.ids"),
    (generate_request(n=0), "n"),
    (generate_request(stop=[""]), "stop"),
    (chat_request(), "messages"),
    (chat_request(("robot", "x")), "messages[0].role"),
    (chat_request(("user", "a"), ("system", "b")), "messages"),
]


@pytest.mark.parametrize(("request_", "field"), BAD, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD)])
async def test_bad_input_names_the_field(tokenizer, request_, field):
    service, router = make_service(tokenizer, says([5]))
    messages, context = await stream_of(service, request_)
    assert context.code is Code.INVALID_ARGUMENT
    assert context.details.startswith(field)
    assert (context.trailing["shoal-error-kind"], context.trailing["shoal-error-field"]) == ("invalid_request", field)
    # The message that carries the status over in Serve, and no other.
    assert [message.SerializeToString() for message in messages] == [b""]
    assert router.requests == []


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (QueueFull("full"), Code.RESOURCE_EXHAUSTED),
        (ExpertsUnavailable("layer 1"), Code.UNAVAILABLE),
        (RuntimeError("secret"), Code.INTERNAL),
    ],
)
async def test_failures_are_statuses(tokenizer, failure, code):
    service, _ = make_service(tokenizer, lambda _: [failure])
    _, context = await stream_of(service, generate_request(), [("x-request-id", "mine")])
    assert context.code is code
    assert "secret" not in context.details
    assert code is not Code.INTERNAL or "mine" in context.details
    assert context.trailing["x-request-id"] == "mine"


async def test_failure_in_mid_stream(tokenizer):
    def script(request):
        yield Delta(request.request_id, (5,))
        yield Delta(request.request_id, finish="error", failure=Failure("experts_unavailable", "layer 1"))

    service, _ = make_service(tokenizer, script)
    messages, context = await stream_of(service, generate_request())
    assert context.code is Code.UNAVAILABLE
    assert [list(message.token_ids) for message in messages] == [[5], []]


async def test_unknown_model_and_missing_template(tokenizer, tmp_path):
    service, _ = make_service(tokenizer, says([5]))
    _, context = await stream_of(service, generate_request(model="other"))
    assert context.code is Code.NOT_FOUND
    _, context = await stream_of(service, generate_request(model=MODEL))
    assert context.code is None
    without, _ = make_service(Tokenizer(write_byte_fallback(tmp_path)), says([5]))
    _, context = await stream_of(without, chat_request(("user", "hello")))
    assert context.code is Code.FAILED_PRECONDITION
    assert "chat template" in context.details


async def test_deadline(tokenizer):
    service, router = make_service(tokenizer, lambda _: [asyncio.Event()])
    _, context = await stream_of(service, generate_request(), [("x-request-timeout-s", "0.05")])
    assert context.code is Code.DEADLINE_EXCEEDED
    assert len(router.closed) == 1
    _, context = await stream_of(service, generate_request(), [("x-request-timeout-s", "soon")])
    assert context.code is Code.INVALID_ARGUMENT
    assert context.trailing["shoal-error-field"] == "x-request-timeout-s"


async def test_cancellation_reaches_the_router(tokenizer):
    service, router = make_service(tokenizer, lambda request: [Delta(request.request_id, (40,)), asyncio.Event()])
    stream = GrpcMethods(service, STILL).generate(generate_request(), FakeContext())
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(router.closed) == 1


async def test_list_models_and_tokenize(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    methods = GrpcMethods(service, STILL)
    (model,) = (await methods.list_models(inference_pb2.ListModelsRequest(), FakeContext())).models
    assert (model.id, model.max_model_len, model.vocab_size, model.has_chat_template) == (MODEL, 64, 400, True)
    answer = await methods.tokenize(inference_pb2.TokenizeRequest(text="<s>hello"), FakeContext())
    assert tuple(answer.token_ids) == tokenizer.encode("<s>hello")
    for skip, text in ((None, "hello"), (False, "<s>hello")):
        request = inference_pb2.DetokenizeRequest(token_ids=answer.token_ids, skip_special_tokens=skip)
        assert (await methods.detokenize(request, FakeContext())).text == text


async def test_unary_errors_are_statuses(tokenizer):
    service, _ = make_service(tokenizer, says([5]))

    methods = GrpcMethods(service, ClusterControl(StillCoordinator(RuntimeError("secret"))))
    context = FakeContext()
    answer = await methods.detokenize(inference_pb2.DetokenizeRequest(token_ids=[400]), context)
    assert (context.code, context.trailing["shoal-error-field"]) == (Code.INVALID_ARGUMENT, "token_ids")
    assert answer.text == ""
    for method, request in (
        (methods.get_load, cluster_pb2.GetLoadRequest()),
        (methods.get_placement, cluster_pb2.GetPlacementRequest()),
    ):
        await method(request, context)
        assert context.code is Code.INTERNAL
        assert "secret" not in context.details
    bare, _ = make_service(None, says([5]))
    await GrpcMethods(bare, STILL).tokenize(inference_pb2.TokenizeRequest(text="x"), context)
    assert context.code is Code.FAILED_PRECONDITION


async def test_cluster_service(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    methods = GrpcMethods(service, STILL)
    placement = await methods.get_placement(cluster_pb2.GetPlacementRequest(), FakeContext())
    assert (placement.version.epoch, placement.version.n) == (3, 7)
    assert [(e.layer, e.expert, list(e.hosts)) for e in placement.experts] == [(1, 0, ["host-a"]), (1, 1, ["host-a", "host-b"])]
    load = await methods.get_load(cluster_pb2.GetLoadRequest(), FakeContext())
    assert [(h.id, h.ready, h.HasField("slots"), h.stats.get("tokens"), h.stats["is_drained"]) for h in load.hosts] == [
        ("host-a", 2, False, 12.0, 0.0),
        ("host-b", 1, True, None, 1.0),
    ]
    assert (load.balancedness, load.HasField("planned_balancedness")) == (0.875, False)
    assert [(line.n, line.kind) for line in load.decisions] == [(1, "stay"), (2, "publish")]
    assert [(r.id, r.map_version.n, dict(r.stats)) for r in load.routers] == [("router-a", 7, {"kv_use": 0.25})]
    assert [(e.expert, e.tokens) for e in load.experts] == [(0, 11), (1, 22)]
    watch = each(methods.watch_load(cluster_pb2.WatchLoadRequest(interval_s=0.1), FakeContext()))
    assert [await anext(watch), await anext(watch)] == [load, load]
    await watch.aclose()
    context = FakeContext()
    short, _ = make_service(tokenizer, says([5]), limits=Limits(max_deadline_s=0.05))
    watch = GrpcMethods(short, STILL).watch_load(cluster_pb2.WatchLoadRequest(interval_s=0.1), context)
    assert [m.HasField("balancedness") async for m in each(watch)] == [True, False]
    assert context.code is Code.DEADLINE_EXCEEDED
    context = FakeContext()
    assert [m.SerializeToString() async for m in each(methods.watch_load(cluster_pb2.WatchLoadRequest(interval_s=0.0), context))] == [b""]
    assert context.code is Code.INVALID_ARGUMENT


def protoc(*arguments):
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], cwd=ROOT, check=True, timeout=60)


def test_generated_code_is_that_of_the_proto_files(tmp_path):
    files = [str(PROTO / "inference.proto"), str(PROTO / "cluster.proto")]
    protoc("-I", ".", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *files)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py"))
    assert len(generated) == 4
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path} is not what protoc makes of its .proto"


def test_a_foreign_client_needs_the_proto_files_only(tmp_path):
    protoc("-I", "cluster/api/proto", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", "shoal/v1/inference.proto")
    program = (
        "from shoal.v1 import inference_pb2, inference_pb2_grpc\n"
        "assert inference_pb2_grpc.InferenceStub.__init__\n"
        "print(inference_pb2.GenerateRequest(text='x').SerializeToString().hex())"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True)
    assert inference_pb2.GenerateRequest.FromString(bytes.fromhex(output.stdout)).text == "x"


def test_every_field_says_what_it_is():
    for name in ("inference.proto", "cluster.proto"):
        lines = (ROOT / PROTO / name).read_text().splitlines()
        for above, line in itertools.pairwise(lines):
            declares = line.strip().startswith(("message ", "enum ", "service ", "rpc ", "oneof ")) or line.rstrip().endswith(";")
            if declares and not line.startswith(("syntax", "package")):
                assert above.strip().startswith("//"), f"{name}: {line.strip()} has no comment"
