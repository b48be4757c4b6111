"""OpenAI's client against a tiny model: for every parameter what it changes, or that it is refused, or that it changes nothing."""

import json
import re
from types import SimpleNamespace

import openai
import pytest
import torch

from cluster.api.parameters import ENDPOINTS, is_ignored, is_refused
from cluster.api.service import TextService
from model.tokenizer import Tokenizer
from tests.cluster_unit.engine_router import EngineRouter
from tests.cluster_unit.front_door import http_client
from tests.reference.local_generation import LocalGenerator
from tests.router.constrained import make_engine, make_grammars
from tests.tiny_models import EOS_TOKEN_IDS, write_tiny

torch.set_num_threads(1)
NAME = "mixtral"
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]
# What OpenAI's client does not know goes into its extra_body.
OWN = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs", "return_token_ids"}
OWN |= {"guided_json", "guided_regex", "guided_choice", "guided_grammar", "chat_template_kwargs", "include_reasoning"}
DRAWN = {"temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    directory = write_tiny(NAME, tmp_path_factory.mktemp(NAME))
    return LocalGenerator.load(directory, num_pages=1), Tokenizer(directory)


@pytest.fixture
async def door(parts):
    local, tokenizer = parts
    router = EngineRouter(make_engine(local, make_grammars(local, tokenizer)))
    vocab_size = local.model.config.vocab_size
    service = TextService("tiny", router, tokenizer, vocab_size=vocab_size, max_model_len=1000, end_token_ids=EOS_TOKEN_IDS)
    async with http_client(service) as http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http) as client:
        yield Door(client, tokenizer)


class Door:
    """`complete` and `chat` are greedy, 16 tokens long and go on past the end token, but for what a test gives."""

    def __init__(self, client, tokenizer):
        self.client, self.tokenizer = client, tokenizer

    async def complete(self, **given):
        return await self._create(self.client.completions.create, {"prompt": "hello", "max_tokens": 16}, given)

    async def chat(self, **given):
        length = {} if "max_completion_tokens" in given else {"max_tokens": 16}
        messages = [{"role": "user", "content": "hello"}]
        return await self._create(self.client.chat.completions.create, {"messages": messages, **length}, given)

    async def _create(self, create, defaults, given):
        body = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True, **defaults, **given}
        own = {name: body.pop(name) for name in OWN & set(body)}
        return await create(**body, extra_body=own)


class Completions:
    """What the two endpoints' answers have in common."""

    endpoint = "completions"

    def __init__(self, door):
        self.door, self.ask = door, door.complete

    async def text(self, **given):
        return (await self.ask(**given)).choices[0].text

    async def token_ids(self, **given):
        return (await self.ask(**given)).choices[0].token_ids

    def delta(self, choice):
        return choice.text


class Chat(Completions):
    endpoint = "chat"

    def __init__(self, door):
        self.door, self.ask = door, door.chat

    async def text(self, **given):
        return (await self.ask(**given)).choices[0].message.content

    def delta(self, choice):
        return choice.delta.content or ""


async def refused(api, name, **given):
    with pytest.raises(openai.BadRequestError) as caught:
        await api.ask(**given)
    assert (caught.value.param or "").startswith(name), caught.value


async def changes_greedy(api, **given):
    assert await api.token_ids(max_tokens=40, **given) != await api.token_ids(max_tokens=40)


async def makes_greedy(api, **given):
    assert await api.token_ids(**DRAWN) != await api.token_ids()
    assert await api.token_ids(**DRAWN, **given) == await api.token_ids()


async def model(api):
    assert (await api.ask()).model == "tiny"
    with pytest.raises(openai.NotFoundError):
        await api.ask(model="other")


async def n(api):
    assert len({tuple(choice.token_ids) for choice in (await api.ask(n=3, **DRAWN)).choices}) == 3


async def stop(api):
    whole = await api.text(max_tokens=40)
    cut = whole[len(whole) // 2 :][:2]
    answer = await api.ask(max_tokens=40, stop=[cut])
    assert answer.choices[0].finish_reason == "stop"
    assert await api.text(max_tokens=40, stop=cut) == whole[: whole.index(cut)]


async def stream(api):
    chunks = [chunk async for chunk in await api.ask(stream=True)]
    assert len(chunks) > 2
    assert "".join(api.delta(chunk.choices[0]) for chunk in chunks) == await api.text()


async def stream_options(api):
    chunks = [chunk async for chunk in await api.ask(stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage.completion_tokens == 16
    await refused(api, "stream_options", stream_options={"include_usage": True})


async def seed(api):
    draws = [await api.token_ids(temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


async def temperature(api):
    assert await api.token_ids(temperature=0, seed=3) == await api.token_ids(temperature=0, seed=4)
    assert await api.token_ids(temperature=1.5, seed=3) != await api.token_ids(temperature=1.5, seed=4)


async def logit_bias(api):
    assert await api.token_ids(logit_bias={"77": 100}) == [77] * 16


async def max_tokens(api):
    answer = await api.ask(max_tokens=5)
    assert (len(answer.choices[0].token_ids), answer.choices[0].finish_reason) == (5, "length")


async def ends(api):
    """A token of the greedy answer that is not its first, and where it first comes."""
    ids = await api.token_ids()
    at = next(at for at in range(1, len(ids)) if ids[at] not in ids[:at])
    return ids[at], at


async def stop_token_ids(api):
    token, at = await ends(api)
    answer = (await api.ask(stop_token_ids=[token])).choices[0]
    assert (len(answer.token_ids), answer.finish_reason) == (at + 1, "stop")


async def min_tokens(api):
    token, at = await ends(api)
    assert len(await api.token_ids(stop_token_ids=[token], min_tokens=at + 3)) >= at + 3


async def ignore_eos(api):
    bias = {str(EOS_TOKEN_IDS[0]): 100}
    assert len(await api.token_ids(logit_bias=bias, ignore_eos=False)) == 1
    assert len(await api.token_ids(logit_bias=bias, ignore_eos=True)) == 16


async def prompt_logprobs(api):
    choice = (await api.ask(prompt_logprobs=1)).choices[0]
    assert len(choice.prompt_logprobs) == len(choice.prompt_token_ids)
    assert choice.prompt_logprobs[0] is None


async def return_token_ids(api):
    assert len((await api.ask(return_token_ids=True)).choices[0].token_ids) == 16
    assert not hasattr((await api.ask(return_token_ids=False)).choices[0], "token_ids")


async def constrained(api, **given):
    return await api.text(ignore_eos=False, max_tokens=120, **given)


async def guided_json(api):
    assert json.loads(await constrained(api, guided_json=CITY))["city"] in ("Paris", "Rome")
    await refused(api, "guided_json", guided_json="{")


async def guided_regex(api):
    assert re.fullmatch("[ab]{3}-[0-9]{2}", await constrained(api, guided_regex="[ab]{3}-[0-9]{2}"))


async def guided_choice(api):
    assert await constrained(api, guided_choice=["yes", "no"]) in ("yes", "no")


async def guided_grammar(api):
    assert await constrained(api, guided_grammar='start: "(" ("a" | "b") ")"') in ("(a)", "(b)")


async def response_format(api):
    given = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    extra = {"response_format": given}
    if api.endpoint == "completions":  # which OpenAI's client does not know of them
        answer = await api.door.client.completions.create(model="tiny", prompt="hello", max_tokens=120, extra_body=extra)
        assert json.loads(answer.choices[0].text)["city"] in ("Paris", "Rome")
        return
    assert json.loads(await constrained(api, **extra))["city"] in ("Paris", "Rome")
    assert (await constrained(api, response_format={"type": "json_object"})).lstrip().startswith("{")


async def user(api):
    assert await api.token_ids(user="me") == await api.token_ids()


def sampled(**given):
    async def check(api):
        await makes_greedy(api, **given)

    return check


def penalised(**given):
    async def check(api):
        await changes_greedy(api, **given)

    return check


SHARED = {
    "model": model,
    "n": n,
    "stop": stop,
    "stream": stream,
    "stream_options": stream_options,
    "seed": seed,
    "temperature": temperature,
    "top_p": sampled(top_p=1e-6),
    "top_k": sampled(top_k=1),
    "min_p": sampled(min_p=1.0),
    "presence_penalty": penalised(presence_penalty=2.0),
    "frequency_penalty": penalised(frequency_penalty=2.0),
    "repetition_penalty": penalised(repetition_penalty=5.0),
    "logit_bias": logit_bias,
    "max_tokens": max_tokens,
    "min_tokens": min_tokens,
    "ignore_eos": ignore_eos,
    "stop_token_ids": stop_token_ids,
    "prompt_logprobs": prompt_logprobs,
    "return_token_ids": return_token_ids,
    "guided_json": guided_json,
    "guided_regex": guided_regex,
    "guided_choice": guided_choice,
    "guided_grammar": guided_grammar,
    "response_format": response_format,
    "user": user,
}


async def prompt(api):
    ids = list(api.door.tokenizer.encode("hello"))
    other = list(api.door.tokenizer.encode("stop"))
    alone = [await api.token_ids(prompt=text) for text in ("hello", "stop")]
    assert alone[0] != alone[1]
    for prompts in (["hello", "stop"], [ids, other]):
        assert [choice.token_ids for choice in (await api.ask(prompt=prompts)).choices] == alone
    assert await api.token_ids(prompt=ids) == alone[0]


async def echo(api):
    assert await api.text(echo=True) == "hello" + await api.text()


async def logprobs(api):
    found = (await api.ask(logprobs=2)).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 16
    assert all(len(top) in (2, 3) for top in found.top_logprobs)


async def best_of(api):
    assert len((await api.ask(n=2, best_of=2)).choices) == 2
    await refused(api, "best_of", best_of=2)


async def messages(api):
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert await api.token_ids(messages=turns) != await api.token_ids()


async def max_completion_tokens(api):
    assert len(await api.token_ids(max_completion_tokens=5)) == 5


async def chat_logprobs(api):
    content = (await api.ask(logprobs=True)).choices[0].logprobs.content
    assert len(content) == 16
    assert all(entry.logprob <= 0 and entry.top_logprobs == [] for entry in content)


async def top_logprobs(api):
    content = (await api.ask(logprobs=True, top_logprobs=2)).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in content), "greedy takes the best"
    await refused(api, "top_logprobs", top_logprobs=2)


async def tools(api):
    assert (await api.ask(tools=TOOLS)).usage.prompt_tokens > (await api.ask()).usage.prompt_tokens


async def forced(api, **given):
    choice = (await api.ask(tools=TOOLS, ignore_eos=False, max_tokens=200, **given)).choices[0]
    return SimpleNamespace(calls=choice.message.tool_calls, finish=choice.finish_reason)


async def tool_choice(api):
    named = await forced(api, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert [call.function.name for call in named.calls] == ["weather"]
    assert json.loads(named.calls[0].function.arguments)["city"] in ("Paris", "Rome")
    assert named.finish == "tool_calls"
    none = await api.ask(tools=TOOLS, tool_choice="none")
    assert none.usage.prompt_tokens == (await api.ask()).usage.prompt_tokens


async def parallel_tool_calls(api):
    one = await forced(api, tool_choice="required", parallel_tool_calls=False)
    assert len(one.calls) == 1
    assert one.calls[0].function.name in ("weather", "clock")
    assert one.finish == "tool_calls"
    assert (await forced(api, tool_choice="required")).calls


async def chat_template_kwargs(api):
    # The tiny template has no variable of its own; what is a renderer's argument is none. Its effect: test_api_chat.
    await refused(api, "chat_template_kwargs", chat_template_kwargs={"tokenize": True})


async def include_reasoning(api):
    given = {"guided_regex": "x"}
    assert await constrained(api, include_reasoning=False, **given) == "x"  # reasoning itself: test_api_chat


async def store(api):
    assert await api.token_ids(store=False) == await api.token_ids()
    await refused(api, "store", store=True)


async def modalities(api):
    assert await api.token_ids(modalities=["text"]) == await api.token_ids()
    await refused(api, "modalities", modalities=["audio"])


TABLES = {
    "completions": (Completions, SHARED | {"prompt": prompt, "echo": echo, "logprobs": logprobs, "best_of": best_of}),
    "chat": (
        Chat,
        SHARED
        | {
            "messages": messages,
            "max_completion_tokens": max_completion_tokens,
            "logprobs": chat_logprobs,
            "top_logprobs": top_logprobs,
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "chat_template_kwargs": chat_template_kwargs,
            "include_reasoning": include_reasoning,
            "store": store,
            "modalities": modalities,
        },
    ),
}
ROWS = [(endpoint, name) for endpoint in TABLES for name in ENDPOINTS[endpoint].model_fields]
IGNORED = {"metadata": {"a": "b"}, "service_tier": "auto", "user": "me"}


@pytest.mark.parametrize(("endpoint", "name"), ROWS)
async def test_every_parameter(door, endpoint, name):
    make, table = TABLES[endpoint]
    api = make(door)
    field = ENDPOINTS[endpoint].model_fields[name]
    if name in table:
        await table[name](api)
    elif is_refused(field):
        body = {"model": "tiny", name: {"x": 1}} | ({"prompt": "x"} if endpoint == "completions" else {"messages": []})
        response = await door.client._client.post(f"/v1/{'' if endpoint == 'completions' else 'chat/'}completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    else:
        assert is_ignored(field), f"{name} has no row"
        plain, given = await api.token_ids(), {name: IGNORED.get(name, "me")}
        assert await api.token_ids(**given) == plain
