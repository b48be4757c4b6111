"""Bodies within bounds: what is too large or too slow is refused, and nobody else waits for it."""

import asyncio
import json

import pytest

from cluster.api.http import http_app
from cluster.guard.body_bounds import BodyBounds
from cluster.guard.http_guard import HttpRules
from tests.cluster_unit.front_door import MODEL, STILL, make_service, says

BODY = json.dumps({"model": MODEL, "prompt": [5, 6]}).encode()


def app_with(**bounds):
    service, router = make_service(None, says([5, 1]))
    return http_app(service, STILL, lambda: True, rules=HttpRules(None, BodyBounds(**bounds))), router


async def call(app, messages, headers=(), path="/v1/completions", method="POST"):
    """One ASGI call; `messages` are what the client sends, None for a client that then stays silent. (status, headers, body)"""
    sent, silent = [], asyncio.Event()
    left = list(messages)

    async def receive():
        if not left or left[0] is None:
            await silent.wait()
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": method, "path": path, "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json"), *headers], "http_version": "1.1", "root_path": ""}
    await asyncio.wait_for(app(scope, receive, send), 20)
    start = sent[0]
    answer = {key.decode(): value.decode() for key, value in start["headers"]}
    return start["status"], answer, b"".join(message.get("body", b"") for message in sent[1:])


def chunk(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_in_pieces_is_one():
    app, router = app_with()
    pieces = [chunk(BODY[i : i + 3]) for i in range(0, len(BODY), 3)] + [chunk(b"", more=False), None]
    assert (await call(app, pieces))[0] == 200
    assert router.requests[0].prompt_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("messages", "headers"),
    [
        ([None], [(b"content-length", b"1001")]),
        ([chunk(b" " * 500), chunk(b" " * 501), None], [(b"transfer-encoding", b"chunked")]),
        ([chunk(b" " * 1001, more=False), None], []),
        ([chunk(b" " * 10**6)] * 4, [(b"content-length", b"4000000")]),
    ],
)
async def test_too_large(messages, headers, monkeypatch):
    monkeypatch.setattr("cluster.guard.body_bounds.LINGER_S", 0.01)
    app, router = app_with(max_bytes=1000)
    status, answer, body = await call(app, messages, headers)
    assert (status, answer["connection"]) == (413, "close")
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert "1000 bytes" in json.loads(body)["error"]["message"]
    assert router.requests == []


async def test_a_slow_body_is_given_up_and_others_do_not_wait_for_it():
    app, _ = app_with(timeout_s=0.5)
    slow = [asyncio.create_task(call(app, [chunk(BODY[:5]), None])) for _ in range(50)]
    await asyncio.sleep(0)
    for _ in range(20):
        assert (await call(app, [chunk(BODY, more=False), None]))[0] == 200
    assert not any(task.done() for task in slow), "they were still at it while the others were served"
    for status, answer, body in await asyncio.gather(*slow):
        assert (status, answer["connection"], json.loads(body)["error"]["code"]) == (408, "close", "body_too_slow")
    assert (await call(app, [chunk(BODY, more=False), None]))[0] == 200


async def test_memory_for_bodies_has_an_end_and_is_given_back():
    app, _ = app_with(timeout_s=0.2, max_held_bytes=1000)
    slow = [asyncio.create_task(call(app, [chunk(b" " * 400), None])) for _ in range(2)]
    await asyncio.sleep(0.01)
    status, answer, body = await call(app, [chunk(b" " * 400 + BODY, more=False), None])
    assert (status, answer["retry-after"], json.loads(body)["error"]["code"]) == (429, "1", "rate_limited")
    await asyncio.gather(*slow)
    assert (await call(app, [chunk(b" " * 400 + BODY, more=False), None]))[0] == 200


async def test_a_client_that_leaves_in_its_body_is_let_go():
    app, router = app_with()
    await call(app, [chunk(BODY[:5]), {"type": "http.disconnect"}])
    assert router.requests == []


async def test_reading_waits_for_no_body():
    app, _ = app_with()
    assert (await call(app, [None], path="/health", method="GET"))[0] == 200
