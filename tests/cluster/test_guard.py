"""The guard behind Serve's own proxies: keys over HTTP and gRPC, a key revoked in mid-stream, clients that are slow or send too much."""

import socket
import threading
import time
import urllib.parse

import grpc
import pytest

from cluster.api.proto.shoal.v1 import inference_pb2, inference_pb2_grpc
from cluster.client import Access, Refused, RequestFailed, ask_json, get_json, post_events
from cluster.guard.keys import new_key
from cluster.guard.keys_file import add_key
from tests.cluster.conftest import App, Shoals
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.cluster

NAME = "guarded"
MAX_BODY = 100_000
BODY_TIMEOUT_S = 3.0
NUM_SLOW = 60


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def keys(keys_file):
    made = {}
    for name, scope in (("reader", "inference"), ("keeper", "operator"), ("leaver", "inference"), ("goner", "inference")):
        made[name], entry = new_key(name, (scope,))
        add_key(keys_file, entry)
    return made


@pytest.fixture(scope="module")
def app(shoals: Shoals, keys, keys_file, tmp_path_factory):
    directory = write_tiny("v2-lite", tmp_path_factory.mktemp("v2-lite"))
    bounds = {"gateway__max_body_bytes": MAX_BODY, "gateway__body_timeout_s": BODY_TIMEOUT_S}
    with shoals.running(directory, NAME, security__keys_file=str(keys_file), **bounds) as running:
        yield running


def completion(num_tokens: int, **fields: object) -> dict[str, object]:
    return {"model": NAME, "prompt": [5, 6, 7], "max_tokens": num_tokens, "ignore_eos": True, **fields}


def test_keys_and_scopes(app: App, keys):
    for key, status in ((None, 401), ("shoal-guess", 401), (keys["keeper"], 403)):
        with pytest.raises(Refused) as refused:
            ask_json(f"{app.http}/v1/completions", completion(4), access=Access(key))
        assert refused.value.status == status
    answer = ask_json(f"{app.http}/v1/completions", completion(4), access=Access(keys["reader"]))
    assert answer["usage"]["completion_tokens"] == 4
    with pytest.raises(Refused) as refused:
        ask_json(f"{app.http}/cluster/rebalance", {}, access=Access(keys["reader"]))
    assert refused.value.status == 403
    assert ask_json(f"{app.http}/cluster/rebalance", {}, access=Access(keys["keeper"]))["id"]
    assert get_json(f"{app.http}/health")["status"] == "ok"


def generate(app: App, channel: grpc.Channel, key: str | None, num_tokens: int) -> grpc.Call:
    sampling = inference_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]), sampling=sampling)
    metadata = app.metadata if key is None else (*app.metadata, ("authorization", f"Bearer {key}"))
    return inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60, metadata=metadata)


def test_grpc_asks_for_the_same_keys(app: App, keys):
    with grpc.insecure_channel(app.grpc) as channel:
        for key, code in ((None, grpc.StatusCode.UNAUTHENTICATED), (keys["keeper"], grpc.StatusCode.PERMISSION_DENIED)):
            with pytest.raises(grpc.RpcError) as refused:
                list(generate(app, channel, key, 4))
            assert refused.value.code() == code
        assert sum(len(delta.token_ids) for delta in generate(app, channel, keys["reader"], 4)) == 4


def test_a_revoked_key_ends_its_streams_within_five_seconds(app: App, keys, keys_file, record_property):
    """One over each protocol, each going on and on until then."""
    ended: dict[str, tuple[float, object]] = {}
    begun = {"gRPC": threading.Event(), "HTTP": threading.Event()}

    def over_grpc() -> None:
        with grpc.insecure_channel(app.grpc) as channel:
            try:
                while True:
                    for _ in generate(app, channel, keys["leaver"], 400):
                        begun["gRPC"].set()
            except grpc.RpcError as error:
                ended["gRPC"] = time.monotonic(), error.code()

    def over_http() -> None:
        try:
            while True:
                for _ in post_events(f"{app.http}/v1/completions", completion(400, stream=True), access=Access(keys["goner"])):
                    begun["HTTP"].set()
        except RequestFailed as error:
            ended["HTTP"] = time.monotonic(), str(error)

    threads = [threading.Thread(target=over) for over in (over_grpc, over_http)]
    for thread in threads:
        thread.start()
    assert all(event.wait(30) for event in begun.values())
    kept = [entry for entry in keys_file.read_text().split("\n- ") if not entry.startswith(("id: leaver", "id: goner"))]
    keys_file.write_text("\n- ".join(kept))
    revoked_at = time.monotonic()
    for thread in threads:
        thread.join(30)
    record_property("ended after", {door: round(at - revoked_at, 2) for door, (at, _) in ended.items()})
    assert ended["gRPC"][1] in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    assert "revoked" in str(ended["HTTP"][1]) or "not known" in str(ended["HTTP"][1])
    assert all(at - revoked_at < 5 for at, _ in ended.values())


def open_socket(app: App, said: bytes) -> socket.socket:
    place = urllib.parse.urlsplit(app.http)
    sock = socket.create_connection((place.hostname, place.port), timeout=30)
    sock.sendall(said)
    return sock


def head(app: App, key: str, length: int) -> bytes:
    lines = [f"POST /{NAME}/v1/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, f"authorization: Bearer {key}", "", ""]).encode()


def first_line(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as file:
        return file.readline()


def test_slow_clients_are_let_go_and_hold_up_nobody(app: App, keys):
    """Some say half a header, some half a body; meanwhile others are served."""
    heads = [open_socket(app, head(app, keys["reader"], 50)[:40]) for _ in range(NUM_SLOW)]
    bodies = [open_socket(app, head(app, keys["reader"], 50) + b'{"model"') for _ in range(NUM_SLOW)]
    for _ in range(5):
        answer = ask_json(f"{app.http}/v1/completions", completion(4), access=Access(keys["reader"]))
        assert answer["usage"]["completion_tokens"] == 4
    assert {first_line(sock).split()[1] for sock in bodies} == {b"408"}
    answer = ask_json(f"{app.http}/v1/completions", completion(4), access=Access(keys["reader"]))
    assert answer["usage"]["completion_tokens"] == 4
    for sock in heads:
        sock.close()


def test_too_much_is_refused_and_the_refusal_is_read(app: App, keys):
    sock = open_socket(app, head(app, keys["reader"], 2 * MAX_BODY) + b" " * (2 * MAX_BODY))
    assert first_line(sock).split()[1] == b"413"
    endless = open_socket(app, head(app, keys["reader"], 10**9) + b" " * MAX_BODY)
    assert first_line(endless).split()[1] == b"413"
    with pytest.raises(Refused) as refused:
        ask_json(f"{app.http}/v1/completions", completion(4, user="x" * MAX_BODY), access=Access(keys["reader"]))
    assert refused.value.status == 413
    assert refused.value.code == "body_too_large"
