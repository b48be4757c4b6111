import asyncio
import json

import httpx
import openai
import pytest

from cluster.api.http import http_app
from model.tokenizer import Tokenizer
from router.errors import ExpertsUnavailable, QueueFull
from router.request import Delta, Failure
from tests.cluster_unit.front_door import MODEL, STILL, VIEW, http_client, make_service, says
from tests.model.tiny_tokenizer import write_byte_fallback, write_byte_level

COMPLETION = {"model": MODEL, "prompt": "hello"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


async def post(service, path, body, **options):
    async with http_client(service) as client:
        if isinstance(body, bytes):
            return await client.post(path, content=body, headers={"content-type": "application/json"}, **options)
        return await client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"} | options.pop("headers", {}), **options
        )


def events_of(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_completion(tokenizer):
    service, router = make_service(tokenizer, says([*tokenizer.encode("world 你"), 1]))
    answer = (await post(service, "/v1/completions", COMPLETION)).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["choices"] == [{"index": 0, "text": "world 你", "logprobs": None, "finish_reason": "stop"}]
    generated = len(tokenizer.encode("world 你")) + 1
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": generated, "total_tokens": generated + 1}
    assert router.requests[0].prompt_token_ids == tokenizer.encode("hello")


@pytest.mark.parametrize("prompt", [["hello", "stop"], [[278], [5, 6]], [5, 6], "hello"])
async def test_every_form_of_prompt(tokenizer, prompt):
    service, router = make_service(tokenizer, says([5]))
    answer = (await post(service, "/v1/completions", {"model": MODEL, "prompt": prompt, "n": 2})).json()
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    ids = [tokenizer.encode(p) if isinstance(p, str) else tuple(p) for p in prompts]
    assert [request.prompt_token_ids for request in router.requests] == [p for p in ids for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_every_parameter_reaches_the_sampler(tokenizer):
    service, router = make_service(tokenizer, says([5]))
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 11,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "logprobs": 3,
        "prompt_logprobs": 2,
    }
    response = await post(service, "/v1/completions", COMPLETION | given | {"logit_bias": {"5": 1, "6": -2.5}, "user": "u"})
    assert response.status_code == 200
    sampling = router.requests[0].sampling.model_dump()
    assert sampling == given | {"stop_token_ids": (7,), "logit_bias": {5: 1.0, 6: -2.5}, "constraint": None}


async def test_stream_and_whole_agree(tokenizer):
    ids = tokenizer.encode("hello 你好 😀 stop here")
    service, _ = make_service(tokenizer, says(ids))
    body = COMPLETION | {"max_tokens": 40, "stop": ["here"], "n": 2, "seed": 1}
    whole = (await post(service, "/v1/completions", body)).json()
    streamed = events_of(await post(service, "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert streamed[-1] == "[DONE]"
    assert streamed[-2]["choices"] == []
    assert streamed[-2]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in streamed[:-2])
    for choice in whole["choices"]:
        parts = [part for chunk in streamed[:-2] for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"] == "hello 你好 😀 stop "
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]
    assert len({chunk["id"] for chunk in streamed[:-1]}) == 1


async def test_chat(tokenizer):
    service, router = make_service(tokenizer, says([*tokenizer.encode("world"), 1]))
    body = CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]}]}
    answer = (await post(service, "/v1/chat/completions", body)).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", "world")
    assert router.requests[0].prompt_token_ids == tokenizer.chat([{"role": "user", "content": "hello\nyou"}])
    chunks = events_of(await post(service, "/v1/chat/completions", CHAT | {"stream": True}))
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]) == "world"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_chat_logprobs(tokenizer):
    ids = tokenizer.encode("你")
    service, _ = make_service(tokenizer, says(ids))
    content = (await post(service, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})).json()["choices"][0]["logprobs"]
    assert [bytes(entry["bytes"]) for entry in content["content"]] == [tokenizer.token_bytes(t) for t in ids]
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -1.25 for entry in content["content"])
    none = (await post(service, "/v1/chat/completions", CHAT | {"logprobs": True})).json()["choices"][0]["logprobs"]
    assert none["content"][0]["top_logprobs"] == []


async def test_completion_logprobs_and_echo(tokenizer):
    ids = tokenizer.encode("world and")
    prompt = tokenizer.encode("hello you")
    service, _ = make_service(tokenizer, says(ids))
    body = COMPLETION | {"prompt": "hello you", "logprobs": 2, "echo": True, "prompt_logprobs": 1}
    choice = (await post(service, "/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == "hello youworld and"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert [choice["text"][offset:].startswith(token) for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
    assert logprobs["token_logprobs"] == [None] + [-1.25] * (len(prompt) + len(ids) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][-1]) == 3
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(prompt[1])]["rank"] == 2
    streamed = events_of(await post(service, "/v1/completions", body | {"stream": True}))[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == choice["text"]
    joined = [token for chunk in streamed for token in chunk["choices"][0]["logprobs"]["tokens"]]
    offsets = [offset for chunk in streamed for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert (joined, offsets) == (logprobs["tokens"], logprobs["text_offset"])


async def test_token_ids_where_there_is_no_tokenizer():
    service, _ = make_service(None, says([5, 6]))
    body = {"model": MODEL, "prompt": [3, 4], "return_token_ids": True}
    choice = (await post(service, "/v1/completions", body)).json()["choices"][0]
    assert (choice["text"], choice["token_ids"], choice["prompt_token_ids"]) == ("", [5, 6], [3, 4])
    chunks = events_of(await post(service, "/v1/completions", body | {"stream": True}))[:-1]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == [5, 6]


async def test_logprobs_do_not_tell_a_stop_string(tokenizer):
    service, _ = make_service(tokenizer, says(tokenizer.encode("hello stop here")))
    body = COMPLETION | {"stop": " stop", "logprobs": 0, "max_tokens": 30}
    choice = (await post(service, "/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "hello"


BAD = [
    (COMPLETION | {"temperature": -1}, "temperature"),
    (COMPLETION | {"temperature": float("nan")}, "temperature"),
    (COMPLETION | {"temperature": "hot"}, "temperature"),
    (COMPLETION | {"temperature": "0.5"}, "temperature"),
    (COMPLETION | {"top_p": 1.5}, "top_p"),
    (COMPLETION | {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETION | {"max_tokens": True}, "max_tokens"),
    (COMPLETION | {"max_tokens": 0}, "max_tokens"),
    (COMPLETION | {"max_tokens": 64}, "max_tokens"),
    (COMPLETION | {"max_tokens": 10**400}, "max_tokens"),
    (COMPLETION | {"n": 0}, "n"),
    (COMPLETION | {"n": 1000}, "n"),
    (COMPLETION | {"prompt": ""}, "prompt"),
    (COMPLETION | {"prompt": []}, "prompt"),
    (COMPLETION | {"prompt": [[]]}, "prompt"),
    (COMPLETION | {"prompt": [5, 400]}, "prompt"),
    (COMPLETION | {"prompt": [-5]}, "prompt"),
    (COMPLETION | {"prompt": 5}, "prompt"),
    (COMPLETION | {"prompt": ["hello", 5]}, "prompt"),
    (COMPLETION | {"prompt": "\ud800"}, "prompt"),
    (COMPLETION | {"prompt": [5] * 64}, "prompt"),
    ({"model": MODEL}, "prompt"),
    ({"prompt": "hello"}, "model"),
    (COMPLETION | {"stop": ""}, "stop"),
    (COMPLETION | {"stop": [5]}, "stop"),
    (COMPLETION | {"logit_bias": {"five": 1}}, "logit_bias"),
    (COMPLETION | {"logit_bias": {"400": 1}}, "logit_bias"),
    (COMPLETION | {"logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETION | {"best_of": 2}, "best_of"),
    (COMPLETION | {"suffix": "end"}, "suffix"),
    (COMPLETION | {"logprobs": 99}, "logprobs"),
    (COMPLETION | {"nonsense": 1}, "nonsense"),
    (COMPLETION | {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETION | {"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
    (CHAT | {"messages": []}, "messages"),
    (CHAT | {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT | {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT | {"messages": [{"role": "user", "content": "x", "nonsense": 5}]}, "messages[0].nonsense"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages[0].content"),
    (CHAT | {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
    (CHAT | {"tools": []}, "tools"),
    (CHAT | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT | {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT | {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    (COMPLETION | {"guided_choice": []}, "guided_choice"),
    (COMPLETION | {"guided_json": "{"}, "guided_json"),
    (COMPLETION | {"guided_grammar": ""}, "guided_grammar"),
    (CHAT | {"top_logprobs": 2}, "top_logprobs"),
    (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT | {"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    (CHAT | {"prompt": "hello"}, "prompt"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input_names_the_field(tokenizer, body, field, stream):
    service, router = make_service(tokenizer, says([5]))
    if stream and "stream_options" not in body:
        body = body | {"stream": True}
    response = await post(service, "/v1/chat/completions" if "messages" in body else "/v1/completions", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(field), error
    assert error["message"].startswith(field), error
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert router.requests == []


async def test_a_field_of_null_is_a_field_left_out(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    body = CHAT | dict.fromkeys(("tools", "response_format", "n", "stop", "temperature", "stream", "max_tokens"))
    assert (await post(service, "/v1/chat/completions", body)).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 10**5, b'{"n": ' + b"9" * 5000 + b"}", b"null"]
)
async def test_malformed_bodies(tokenizer, body):
    service, _ = make_service(tokenizer, says([5]))
    response = await post(service, "/v1/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_body_without_content_type(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    async with http_client(service) as client:
        response = await client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "content-type" in response.json()["error"]["message"]


async def test_unknown_model_and_path(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    response = await post(service, "/v1/completions", COMPLETION | {"model": "other"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    async with http_client(service) as client:
        for path in ("/v1/nonsense", "/cluster/nonsense"):
            response = await client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        response = await client.get("/v1/completions")
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
        assert (await client.get("/v1/models/other")).status_code == 404


async def test_chat_without_template(tmp_path):
    service, _ = make_service(Tokenizer(write_byte_fallback(tmp_path)), says([5]))
    response = await post(service, "/v1/chat/completions", CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")
    assert "chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "header"),
    [
        (QueueFull("full"), 429, ("retry-after", "1")),
        (ExpertsUnavailable("layer 1, expert 2"), 503, ("retry-after", "1")),
        (RuntimeError("secret"), 500, ("x-request-id", "mine")),
    ],
)
async def test_refusals_before_the_first_byte(tokenizer, failure, status, header, stream):
    service, _ = make_service(tokenizer, lambda _: [failure])
    response = await post(service, "/v1/completions", COMPLETION | {"stream": stream}, headers={"x-request-id": "mine"})
    assert response.status_code == status
    assert response.headers[header[0]] == header[1]
    assert "secret" not in response.text
    if status == 500:
        assert "mine" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline(tokenizer, stream):
    service, router = make_service(tokenizer, lambda _: [asyncio.Event()])
    response = await post(service, "/v1/completions", COMPLETION | {"stream": stream}, headers={"X-Request-Timeout-S": "0.05"})
    assert response.status_code == 408
    assert response.headers["x-should-retry"] == "false"
    assert len(router.closed) == 1


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "0", "inf"])
async def test_bad_deadline_header(tokenizer, value):
    service, _ = make_service(tokenizer, says([5]))
    response = await post(service, "/v1/completions", COMPLETION, headers={"X-Request-Timeout-S": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Request-Timeout-S")


async def test_failure_in_mid_stream_is_an_event_and_the_end(tokenizer):
    def script(request):
        yield Delta(request.request_id, (5,))
        yield Delta(request.request_id, finish="error", failure=Failure("experts_unavailable", "layer 1, expert 2"))

    service, _ = make_service(tokenizer, script)
    response = await post(service, "/v1/completions", COMPLETION | {"stream": True})
    assert response.status_code == 200
    *_, last = events_of(response)
    assert last["error"]["code"] == "experts_unavailable"


async def test_an_admission_opens_the_stream(tokenizer):
    def script(request):
        yield Delta(request.request_id)
        yield QueueFull("too late")

    service, _ = make_service(tokenizer, script)
    response = await post(service, "/v1/completions", COMPLETION | {"stream": True})
    assert response.status_code == 200
    assert events_of(response)[-1]["error"]["code"] == "queue_full"


async def test_request_id_is_echoed_or_made(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    mine = await post(service, "/v1/completions", COMPLETION, headers={"x-request-id": "mine"})
    assert mine.headers["x-request-id"] == "mine"
    assert mine.json()["id"] == "cmpl-mine"
    made = await post(service, "/v1/completions", COMPLETION, headers={"x-request-id": "no good id " + "x" * 200})
    assert made.json()["id"] == "cmpl-" + made.headers["x-request-id"]
    app = http_app(service, STILL, lambda: True, echo_request_id=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert "x-request-id" not in (await client.get("/health")).headers


async def disconnect_after(app, body, num_events):
    """Runs one ASGI call whose client leaves after so many body messages; returns what was sent."""
    sent, gone = [], asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if sum(m["type"] == "http.response.body" for m in sent) >= num_events:
            gone.set()

    if num_events == 0:
        asyncio.get_running_loop().call_later(0.05, gone.set)
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1", "root_path": ""}
    await asyncio.wait_for(app(scope, receive, send), 10)
    return sent


@pytest.mark.parametrize(("stream", "num_events"), [(True, 2), (True, 0), (False, 0)])
async def test_client_gone_cancels(tokenizer, stream, num_events):
    def script(request):
        if num_events:
            for token in tokenizer.encode("hello you"):
                yield Delta(request.request_id, (token,))
        yield asyncio.Event()

    service, router = make_service(tokenizer, script)
    app = http_app(service, STILL, lambda: True)
    await disconnect_after(app, COMPLETION | {"stream": stream, "n": 2}, num_events)
    assert len(router.closed) == len(router.requests) == 2


async def test_models_health_and_cluster(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    async with http_client(service) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await client.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 64
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/cluster")).json() == VIEW
        assert (await client.get("/openapi.json")).status_code == 200
    async with http_client(service, ready=False) as client:
        assert (await client.get("/ready")).status_code == 503


async def test_official_client(tokenizer):
    ids = tokenizer.encode("hello 你好")
    service, router = make_service(tokenizer, says([*ids, 1]))
    async with http_client(service) as http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http) as client:
        messages = [{"role": "user", "content": "hello"}]
        assert (await client.completions.create(model=MODEL, prompt="hello")).choices[0].text == "hello 你好"
        chat = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=1)
        assert chat.choices[0].message.content == "hello 你好"
        assert len(chat.choices[0].logprobs.content) == len(ids) + 1
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "hello 你好"
        assert chunks[-1].usage.completion_tokens == len(ids) + 1
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.BadRequestError, match="top_p") as caught:
            await client.completions.create(model=MODEL, prompt="hello", top_p=7)
        assert (caught.value.param, caught.value.code) == ("top_p", "invalid_request")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        calls = len(router.requests)
        router.script = lambda _: [asyncio.Event()]
        with pytest.raises(openai.APIStatusError) as late:
            await client.completions.create(model=MODEL, prompt="hello", extra_headers={"X-Request-Timeout-S": "0.02"})
        assert late.value.status_code == 408
        assert len(router.requests) == calls + 1, "the client must not retry a deadline"
