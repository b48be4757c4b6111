import json

import openai
import pytest

from model.tokenizer import Tokenizer
from router.request import Delta, Failure
from tests.cluster_unit.front_door import MODEL, http_client, make_service, says
from tests.model.tiny_tokenizer import write_byte_level

TOOL = {"type": "function", "name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def door(tokenizer, text, **options):
    return make_service(tokenizer, says([*tokenizer.encode(text), 1]), **{"max_model_len": 2048, **options})


def prompt_of(tokenizer, router):
    return tokenizer.decode(router.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def ask(service, body):
    async with http_client(service) as client:
        return await client.post("/v1/responses", json={"model": MODEL, "input": "hello"} | body)


async def test_text(tokenizer):
    service, router = door(tokenizer, "world 你")
    async with http_client(service) as http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http) as client:
        answer = await client.responses.create(model=MODEL, input="hello", instructions="be brief", metadata={"a": "b"}, temperature=0.5)
    assert answer.output_text == "world 你"
    assert (answer.status, answer.metadata, answer.temperature, answer.store) == ("completed", {"a": "b"}, 0.5, False)
    assert prompt_of(tokenizer, router) == "<s>system\nbe brief</s>\n<s>user\nhello</s>\n<s>assistant\n"
    assert answer.usage.output_tokens == len(tokenizer.encode("world 你")) + 1
    assert answer.usage.input_tokens == len(router.requests[0].prompt_token_ids)


async def test_a_stream_tells_of_every_item_from_its_beginning_to_its_end(tokenizer):
    service, _ = door(tokenizer, "<think>well</think>world")
    async with http_client(service) as http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http) as client:
        stream = await client.responses.create(model=MODEL, input="hello", stream=True)
        events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert list(dict.fromkeys(kinds[2:-1])) == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
    ]
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output[0].content[0].text == "well"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text == "world"
    whole = (await ask(service, {})).json()
    assert [item["content"][0]["text"] for item in whole["output"]] == ["well", "world"]
    assert whole["usage"] == final.usage.model_dump(exclude_none=True)
    assert 0 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_and_what_came_of_them(tokenizer, stream):
    service, router = door(tokenizer, '{"city": "x"}')
    body = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}, "stream": stream}
    response = await ask(service, body)
    if stream:
        events = [json.loads(event.split("\ndata: ")[1]) for event in response.text.split("\n\n") if event]
        deltas = "".join(event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta")
        assert deltas == '{"city": "x"}'
        answer = events[-1]["response"]
    else:
        answer = response.json()
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["arguments"]) == ("function_call", "weather", '{"city": "x"}')
    assert router.requests[0].sampling.constraint.kind == "json_schema"
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}, item]
    turns += [{"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}]
    assert (await ask(service, {"input": turns})).status_code == 200
    assert prompt_of(tokenizer, router).endswith("<s>tool\nrain</s>\n<s>assistant\n")


async def test_form_length_and_logprobs(tokenizer):
    service, router = door(tokenizer, "world and more")
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    body = {"text": {"format": schema}, "max_output_tokens": 2, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = (await ask(service, body)).json()
    sampling = router.requests[0].sampling
    assert (sampling.constraint.kind, sampling.constraint.value) == ("json_schema", '{"type": "object"}')
    assert (sampling.max_tokens, sampling.logprobs) == (2, 1)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 2
    assert all(len(entry["top_logprobs"]) == 1 for entry in logprobs)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3000.0, "top_p": 2}, "top_p"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {"$ref": "x" * 200_000}}}}, "text.format"),
        ({"store": True}, "store"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_bad_fields_are_named(tokenizer, body, field):
    service, _ = door(tokenizer, "x")
    response = await ask(service, body)
    if field is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(field), response.text


async def test_a_failure_in_mid_stream_is_an_event(tokenizer):
    def script(request):
        yield Delta(request.request_id, tokenizer.encode("hello"))
        yield Delta(request.request_id, finish="error", failure=Failure("experts_unavailable", "layer 1, expert 2"))

    service, _ = make_service(tokenizer, script, max_model_len=2048)
    response = await ask(service, {"stream": True})
    last = json.loads(response.text.split("\n\n")[-2].split("\ndata: ")[1])
    assert (last["type"], last["error"]["code"]) == ("error", "experts_unavailable")


async def test_tokenize_and_back(tokenizer):
    service, _ = door(tokenizer, "x")
    async with http_client(service) as client:
        prompt = (await client.post("/tokenize", json={"prompt": "hello 你", "return_token_strs": True})).json()
        ids = list(tokenizer.encode("hello 你"))
        assert (prompt["tokens"], prompt["count"], prompt["max_model_len"]) == (ids, len(ids), 2048)
        assert prompt["token_strs"][0] == "hello"
        chat = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "hello"}]})).json()
        assert chat["tokens"] == list(tokenizer.chat([{"role": "user", "content": "hello"}]))
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "hello 你"}
        for path, body, field in [
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
            ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
            ("/detokenize", {"tokens": [400]}, "tokens"),
        ]:
            response = await client.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text
        assert (await client.post("/tokenize", json={"model": "other", "prompt": "x"})).status_code == 404


async def test_trace_context_is_echoed(tokenizer):
    service, _ = door(tokenizer, "x")
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with http_client(service) as client:
        assert (await client.get("/health", headers={"traceparent": given})).headers["traceparent"] == given
        assert "traceparent" not in (await client.get("/health", headers={"traceparent": "nonsense"})).headers
