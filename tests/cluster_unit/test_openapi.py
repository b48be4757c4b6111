"""The OpenAPI document is true: every endpoint is described, and the answers are of its schemas."""

import json

import jsonschema
import pytest

from cluster.api.http import http_app
from cluster.api.openapi import HTTP_METHODS
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, http_client, make_service, says
from tests.model.tiny_tokenizer import write_byte_level


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    tokenizer = Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    service, _ = make_service(tokenizer, says([*tokenizer.encode("hello"), 1]), max_model_len=512)
    return http_app(service, STILL, lambda: True)


async def document(app):
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path="/tiny"), base_url="http://test") as client:
        page = await client.get("/tiny/docs")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert 'fetch("openapi.json")' in page.text, "relative, so that it is found behind Serve's route prefix"
        assert "http" + "s://" not in page.text, "nothing from elsewhere"
        return (await client.get("/tiny/openapi.json")).json()


async def test_every_endpoint_says_what_it_takes_answers_and_refuses(app):
    api = await document(app)
    assert {"url": "/tiny"} in api["servers"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/tokenize", "/detokenize", "/health", "/ready"):
        for method, operation in api["paths"][path].items():
            assert method in HTTP_METHODS
            assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert {"400", "401", "408", "429", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"], "the door answers 400"
    temperature = api["components"]["schemas"]["ChatCompletionRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0.0} in temperature["anyOf"]


TOOL = {"type": "function", "function": {"name": "f"}}
ALL = {"n": 2, "max_tokens": 5, "prompt_logprobs": 1, "return_token_ids": True}


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("/v1/completions", {"prompt": "hello", "logprobs": 1, "echo": True, **ALL}, "Completion"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 1, "tools": [TOOL], **ALL}, "ChatCompletion"),
        ("/v1/responses", {"input": "hello", "include": ["message.output_text.logprobs"]}, "ResponseAnswer"),
        ("/tokenize", {"prompt": "hello", "return_token_strs": True}, "TokenizeAnswer"),
        ("/detokenize", {"tokens": [3]}, "DetokenizeAnswer"),
    ],
)
async def test_answers_are_of_their_schemas(app, tmp_path, path, body, schema):
    tokenizer = Tokenizer(write_byte_level(tmp_path))
    text = '<think>well</think>x <tool_call>{"name": "f", "arguments": {}}</tool_call>' if "chat" in path else "hello"
    service, _ = make_service(tokenizer, says([*tokenizer.encode(text), 1]), max_model_len=512)
    api = await document(app)
    body = {"model": MODEL} | body | ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 200} if "chat" in path else {})

    def check(value, name):
        jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": api["components"]})

    async with http_client(service) as client:
        check((await client.post(path, json=body)).json(), schema)
        check((await client.post(path, json={"nonsense": 1})).json(), "ErrorAnswer")
        if "v1" not in path:
            return
        events = (await client.post(path, json=body | {"stream": True})).text.split("\n\n")
    streamed = {"ChatCompletion": "ChatCompletionChunk", "ResponseAnswer": "ResponseEvent"}.get(schema, schema)
    values = [json.loads(event.split("data: ")[1]) for event in events if event and not event.endswith("[DONE]")]
    assert len(values) > 1
    for value in values:
        check(value, streamed)
