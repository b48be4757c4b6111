"""The guard as clients meet it, over HTTP and gRPC: a row for each way to be refused, and what a revoked key runs into."""

import asyncio
import json
import logging
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from cluster.api.control import ClusterControl
from cluster.api.proto.shoal.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from cluster.api.service import Limits
from cluster.gateway import Gateway
from cluster.guard.guard import Guard
from cluster.guard.http_guard import HttpRules
from cluster.guard.key_source import KeySource
from cluster.guard.keys import KeyLimits, new_key
from cluster.guard.keys_file import add_key
from model.tokenizer import Tokenizer
from router.request import Delta
from tests.cluster_unit.front_door import MODEL, StillCoordinator, make_service, says
from tests.cluster_unit.grpc_door import grpc_door
from tests.model.tiny_tokenizer import write_byte_level

Code = grpc.StatusCode
TOKENS = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


class Front:
    """Both doors of one gateway that asks for keys out of a file."""

    def __init__(self, directory, tokenizer, script=None, limits=None):
        self.file = directory / "keys.yaml"
        self.keys = {}
        for name, scopes, limits_of_key in (
            ("reader", ("inference",), KeyLimits()),
            ("keeper", ("operator",), KeyLimits()),
            ("rare", ("inference",), KeyLimits(requests_per_minute=2)),
            ("short", ("inference",), KeyLimits(tokens_per_minute=8)),
            ("single", ("inference",), KeyLimits(concurrent_streams=1)),
        ):
            self.keys[name], entry = new_key(name, scopes, limits_of_key)
            add_key(self.file, entry)
        self.now_s = 1000.0
        self.guard = Guard(KeySource((), self.file), clock=lambda: self.now_s)
        self.service, self.router = make_service(tokenizer, script or says([*TOKENS, 1]), limits=limits or Limits(max_sequences=4))
        self.control = ClusterControl(StillCoordinator())
        self.gateway = Gateway(self.service, self.control, lambda: True, None, HttpRules(self.guard), self.guard)

    def forget(self, name):
        """Takes the key's entry out of the file."""
        kept = [line for line in self.file.read_text().split("\n- ") if not line.startswith(f"id: {name}\n")]
        self.file.write_text("\n- ".join(kept))

    def look(self):
        """A second passes, in which the guard looks at the file."""
        self.now_s += 1.5
        self.guard.look(self.now_s)

    def bearer(self, name):
        return {"authorization": f"Bearer {self.keys.get(name, name)}"} if name else {}


@asynccontextmanager
async def opened(front):
    """What speaks to it over either protocol, with a key: (status, kind, headers or metadata, text)."""
    app = front.gateway.__serve_build_asgi_app__()
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        grpc_door(front.gateway) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):

        async def http(name, what="infer", body=None):
            method, path = {"infer": ("POST", "/v1/completions"), "operate": ("POST", "/cluster/rebalance"), "look": ("GET", "/cluster")}[
                what
            ]
            body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 4} | (body or {})
            answer = await client.request(method, path, json=None if method == "GET" else body, headers=front.bearer(name))
            kind = answer.json().get("error", {}).get("code") if answer.status_code >= 400 else None
            return answer.status_code, kind, answer.headers, answer.text

        async def rpc(name, what="infer", body=None):
            inference, cluster = inference_pb2_grpc.InferenceStub(channel), cluster_pb2_grpc.ClusterStub(channel)
            metadata = tuple(front.bearer(name).items())
            fields = dict(body or {})
            prompt = inference_pb2.TokenIds(ids=fields.pop("prompt", [5, 6]))
            request = inference_pb2.GenerateRequest(token_ids=prompt, sampling=inference_pb2.SamplingParams(max_tokens=4), **fields)
            calls = {"infer": lambda: inference.Generate(request, metadata=metadata)}
            calls |= {"operate": lambda: cluster.Rebalance(cluster_pb2.RebalanceRequest(), metadata=metadata)}
            calls |= {"look": lambda: cluster.GetPlacement(cluster_pb2.GetPlacementRequest(), metadata=metadata)}
            call = calls[what]()
            try:
                if what == "infer":
                    async for _ in call:
                        pass
                else:
                    await call
            except grpc.aio.AioRpcError as error:
                trailing = dict(error.trailing_metadata())
                return error.code(), trailing.get("shoal-error-kind"), trailing, error.details()
            return Code.OK, None, {}, ""

        yield {"http": http, "grpc": rpc}
    await front.guard.close()


OK = {"http": 200, "grpc": Code.OK}
REFUSED = {
    "unauthenticated": {"http": 401, "grpc": Code.UNAUTHENTICATED},
    "permission_denied": {"http": 403, "grpc": Code.PERMISSION_DENIED},
    "rate_limited": {"http": 429, "grpc": Code.RESOURCE_EXHAUSTED},
    "invalid_request": {"http": 400, "grpc": Code.INVALID_ARGUMENT},
}
ROWS = [
    # who, what, body, refusal, header of HTTP
    ("no key", None, "infer", {}, "unauthenticated", ("www-authenticate", 'Bearer realm="shoal"')),
    ("no key, looking on", None, "look", {}, "unauthenticated", ("www-authenticate", 'Bearer realm="shoal"')),
    ("wrong key", "shoal-guess", "infer", {}, "unauthenticated", ("www-authenticate", 'Bearer realm="shoal", error="invalid_token"')),
    ("long key", "x" * 4000, "infer", {}, "unauthenticated", ("www-authenticate", 'Bearer realm="shoal", error="invalid_token"')),
    (
        "wrong scope",
        "reader",
        "operate",
        {},
        "permission_denied",
        ("www-authenticate", 'Bearer realm="shoal", error="insufficient_scope", scope="operator"'),
    ),
    (
        "wrong scope, the other way",
        "keeper",
        "infer",
        {},
        "permission_denied",
        ("www-authenticate", 'Bearer realm="shoal", error="insufficient_scope", scope="inference"'),
    ),
    ("prompt beyond the key's tokens", "short", "infer", {"prompt": [5] * 9}, "rate_limited", ("x-should-retry", "false")),
    ("too many answers", "reader", "infer", {"n": 5}, "invalid_request", None),
    ("prompt too long", "reader", "infer", {"prompt": [5] * 21}, "invalid_request", None),
]


@pytest.mark.parametrize("door", ["http", "grpc"])
@pytest.mark.parametrize(("name", "what", "body", "kind", "header"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
async def test_refused(tmp_path, tokenizer, door, name, what, body, kind, header):
    front = Front(tmp_path, tokenizer, limits=Limits(max_sequences=4, max_prompt_tokens=20))
    async with opened(front) as doors:
        status, said, headers, text = await doors[door](name, what, body)
        assert (status, said) == (REFUSED[kind][door], kind), text
        if door == "http" and header is not None:
            assert headers[header[0]] == header[1]
        assert front.router.requests == []
        assert name is None or len(name) < 20 or name not in text


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_served(tmp_path, tokenizer, door):
    front = Front(tmp_path, tokenizer)
    async with opened(front) as doors:
        assert (await doors[door]("reader"))[0] == OK[door]
        for name in ("reader", "keeper"):
            assert (await doors[door](name, "look"))[0] == OK[door]
        front.control._coordinator = None  # whoever gets so far fails of that, and not of the guard
        assert (await doors[door]("keeper", "operate"))[1] == "internal"


@pytest.mark.parametrize("door", ["http", "grpc"])
@pytest.mark.parametrize(("name", "calls", "limit"), [("rare", 2, "2 requests per minute"), ("short", 2, "8 tokens per minute")])
async def test_limits_by_the_minute(tmp_path, tokenizer, door, name, calls, limit):
    """Two calls of two tokens read and four written are served; the next waits until the first is a minute ago."""
    front = Front(tmp_path, tokenizer)
    async with opened(front) as doors:
        for _ in range(calls):
            assert (await doors[door](name))[0] == OK[door]
            await front.guard.tell(front.now_s)
        status, kind, headers, text = await doors[door](name)
        assert (status, kind) == (REFUSED["rate_limited"][door], "rate_limited")
        assert limit in text
        if door == "http":
            assert 55 <= int(headers["retry-after"]) <= 65
        assert (await doors[door]("reader"))[0] == OK[door], "another key has limits of its own"
        front.now_s += 66
        assert (await doors[door](name))[0] == OK[door]


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_concurrent_streams(tmp_path, tokenizer, door):
    begun, go_on = asyncio.Event(), asyncio.Event()

    def script(request):
        yield Delta(request.request_id, (5,))
        begun.set()
        yield go_on
        yield Delta(request.request_id, (1,), finish="stop")

    front = Front(tmp_path, tokenizer, script)
    async with opened(front) as doors:
        first = asyncio.create_task(doors[door]("single"))
        await begun.wait()
        status, kind, headers, text = await doors[door]("single")
        assert (status, kind) == (REFUSED["rate_limited"][door], "rate_limited")
        assert "1 concurrent streams" in text
        assert door == "grpc" or headers["retry-after"] == "1"
        go_on.set()
        assert (await first)[0] == OK[door]
        for _ in range(3):
            assert (await doors[door]("single"))[0] == OK[door], "a stream that has ended is not in the way of the next"


@pytest.mark.parametrize(("name", "num_served"), [("rare", 2), ("single", 1)])
async def test_limits_hold_for_each_request_of_a_batch(tmp_path, tokenizer, name, num_served):
    """All four are sent before one is answered; the call itself goes on."""
    begun, go_on = asyncio.Semaphore(0), asyncio.Event()

    def script(request):
        yield Delta(request.request_id, (5,))
        begun.release()
        yield go_on
        yield Delta(request.request_id, (1,), finish="stop")

    front = Front(tmp_path, tokenizer, script)
    wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6]))
    kinds = {}
    async with opened(front), grpc_door(front.gateway) as address, grpc.aio.insecure_channel(address) as channel:
        requests = [inference_pb2.BatchRequest(id=str(i), generate=wanted) for i in range(4)]
        stub = inference_pb2_grpc.InferenceStub(channel)
        async for response in stub.GenerateBatch(iter(requests), metadata=tuple(front.bearer(name).items())):
            if response.last:
                kinds[response.id] = response.error.kind
                if len(kinds) == 4 - num_served:
                    for _ in range(num_served):
                        await begun.acquire()
                    go_on.set()
    assert sorted(kinds.values()) == [""] * num_served + ["rate_limited"] * (4 - num_served)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_key_is_taken_and_given_up_while_it_runs(tmp_path, tokenizer, door):
    front = Front(tmp_path, tokenizer)
    front.keys["late"], entry = new_key("late", ("inference",))
    async with opened(front) as doors:
        assert (await doors[door]("late"))[1] == "unauthenticated"
        add_key(front.file, entry)
        front.now_s += 1.5
        assert (await doors[door]("late"))[0] == OK[door]
        front.forget("late")
        front.now_s += 1.5
        assert (await doors[door]("late"))[1] == "unauthenticated"
        assert (await doors[door]("reader"))[0] == OK[door]


@pytest.mark.parametrize("door", ["http", "grpc"])
@pytest.mark.parametrize("name", ["reader", "single"])
async def test_a_revoked_key_ends_its_streams(tmp_path, tokenizer, door, name):
    """The stream is in the middle of an answer that never ends; the router is told, and another key's stream goes on."""
    begun, ends = asyncio.Semaphore(0), asyncio.Event()

    def script(request):
        yield Delta(request.request_id, (5,))
        begun.release()
        yield ends
        yield Delta(request.request_id, (1,), finish="stop")

    front = Front(tmp_path, tokenizer, script)
    front.keys["other"], entry = new_key("other", ("inference",))
    add_key(front.file, entry)
    front.look()
    async with opened(front) as doors:
        revoked, other = (asyncio.create_task(doors[door](key, "infer", {})) for key in (name, "other"))
        for _ in range(2):
            await begun.acquire()
        front.forget(name)
        front.look()
        status, kind, _, text = await asyncio.wait_for(revoked, 5)
        assert (status, kind) == (REFUSED["permission_denied"][door], "permission_denied")
        assert "was revoked" in text
        assert not other.done()
        assert len(front.router.closed) == 1
        ends.set()
        assert (await other)[0] == OK[door]


async def test_the_guard_looks_by_itself_while_streams_run(tmp_path, tokenizer):
    """With the clock that gateways have: a stream over HTTP ends with an error event within five seconds of the file's change."""
    front = Front(tmp_path, tokenizer, lambda request: [Delta(request.request_id, (5,)), asyncio.Event()])
    front.guard._clock = asyncio.get_running_loop().time
    app = front.gateway.__serve_build_asgi_app__()
    sent, begun = [], asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps({"model": MODEL, "prompt": [5], "stream": True}).encode(), "more_body": False}]

    async def receive():
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            begun.set()

    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {front.keys['reader']}".encode())]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": headers, "query_string": b"", "http_version": "1.1", "root_path": ""}
    running = asyncio.create_task(app(scope, receive, send))
    await begun.wait()
    front.forget("reader")
    await asyncio.wait_for(running, 5)
    assert sent[0]["status"] == 200
    last = b"".join(message.get("body", b"") for message in sent[1:]).split(b"data: ")[-1]
    assert json.loads(last)["error"]["code"] == "permission_denied"
    assert len(front.router.closed) == 1
    await front.guard.close()


async def read_to_the_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_watching_ends_with_the_key(tmp_path, tokenizer):
    front = Front(tmp_path, tokenizer)
    async with opened(front), grpc_door(front.gateway) as address, grpc.aio.insecure_channel(address) as channel:
        call = cluster_pb2_grpc.ClusterStub(channel).WatchLoad(
            cluster_pb2.WatchLoadRequest(interval_s=0.1), metadata=tuple(front.bearer("keeper").items())
        )
        assert await call.read() is not grpc.aio.EOF
        front.forget("keeper")
        front.look()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read_to_the_end(call)
        assert ended.value.code() is Code.PERMISSION_DENIED


CANARY = "canaryinthecoalmine"


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_nothing_that_a_client_says_is_logged(tmp_path, tokenizer, door, caplog):
    """Not its prompt, not its key, not what its request fails of."""

    def script(request):
        if request.sampling.max_tokens == 1:
            raise ValueError(f"about {CANARY}")
        yield from says([*TOKENS, 1])(request)

    front = Front(tmp_path, tokenizer, script)
    with caplog.at_level(logging.DEBUG, "shoal"), caplog.at_level(logging.DEBUG, "cluster"):
        async with opened(front) as doors:
            text = {"prompt": CANARY} if door == "http" else {}
            for name in ("reader", CANARY, "keeper"):
                await doors[door](name, "infer", text)
            if door == "http":
                assert (await doors[door]("reader", "infer", text | {"max_tokens": 1}))[0] == 500
                await doors[door]("reader", "infer", {"prompt": CANARY, CANARY: 1})
    assert door == "grpc" or caplog.records
    assert CANARY not in caplog.text
    assert not any(key in caplog.text for key in front.keys.values())


async def test_an_operator_sees_the_guard(tmp_path, tokenizer):
    front = Front(tmp_path, tokenizer)
    app = front.gateway.__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/cluster/guard")).status_code == 401
        view = (await client.get("/cluster/guard", headers=front.bearer("keeper"))).json()
        assert view == {"asks_for_keys": True, "num_keys": 5, "limits_hold_for": "each gateway for itself", "problem": None}
        front.file.write_text("keys: [")
        front.look()
        assert "no YAML" in (await client.get("/cluster/guard", headers=front.bearer("keeper"))).json()["problem"]
    await front.guard.close()
