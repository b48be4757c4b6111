"""What OpenAI's API takes, as schemas, and the call that each request means. Bounds are those of SamplingParams."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.api.schema import Schema
from cluster.api.service import Call
from router.errors import InvalidRequest
from router.request import SamplingParams

# A part of OpenAI's API that is not served: null is let through, a value is refused by name.
NotServed = Annotated[None, Field(description="Not served: leave it out.")]


class StreamOptions(Schema):
    """Of a streamed answer."""

    include_usage: bool = Field(False, description="Sends the usage in a last chunk, without choices.")


class _Generation(Schema):
    """What completions and chat share. The names are OpenAI's, those it lacks are vLLM's."""

    model: str
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = Field(None, description="Sends token ids beside the text.")
    user: str | None = Field(None, description="Taken and ignored.")


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = Field(None, description="Refused unless equal to n.")
    suffix: NotServed = None


class TextPart(Schema):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatCompletionRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: NotServed = None
    tool_choice: NotServed = None
    parallel_tool_calls: NotServed = None
    functions: NotServed = None
    function_call: NotServed = None
    response_format: NotServed = None
    modalities: NotServed = None
    audio: NotServed = None
    prediction: NotServed = None
    reasoning_effort: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None
    service_tier: NotServed = None
    store: NotServed = None
    metadata: NotServed = None


SAME_NAME = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "prompt_logprobs",
)


def completion_call(body: CompletionRequest, request_id: str, deadline_s: float | None, deadline_name: str) -> Call:
    """The call that a completions request means. InvalidRequest where its fields contradict each other."""
    _check_stream_options(body)
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequest("best_of: choosing among answers is not served; leave it out or make it equal to n.", field="best_of")
    sampling = _sampling(body)
    sampling["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        sampling["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    prompts = _prompts(body.prompt)
    names = {"deadline_s": deadline_name}
    return Call(request_id, body.model, prompts, None, sampling, _stops(body.stop), n, deadline_s, names)


def chat_call(body: ChatCompletionRequest, request_id: str, deadline_s: float | None, deadline_name: str) -> Call:
    """The call that a chat request means. InvalidRequest where its fields contradict each other."""
    _check_stream_options(body)
    names = {"deadline_s": deadline_name, "logprobs": "top_logprobs", "prompt": "messages"}
    sampling = _sampling(body)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens: differs from max_completion_tokens; give one of them.", field="max_tokens")
        sampling["max_tokens"] = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true.", field="top_logprobs")
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    messages = tuple(_message(message) for message in body.messages)
    return Call(request_id, body.model, (), messages, sampling, _stops(body.stop), 1 if body.n is None else body.n, deadline_s, names)


def _check_stream_options(body: _Generation) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: needs stream to be true.", field="stream_options")


def _sampling(body: _Generation) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(body, name) for name in SAME_NAME}
    assert set(values) <= set(SamplingParams.model_fields)
    if body.logit_bias is not None:
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in body.logit_bias):
            raise InvalidRequest("logit_bias: its keys must be token ids.", field="logit_bias")
        values["logit_bias"] = {int(key): bias for key, bias in body.logit_bias.items()}
    return values


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and isinstance(prompt[0], int):
        return (tuple(token for token in prompt if isinstance(token, int)),)
    return tuple(part if isinstance(part, str) else tuple(part) for part in prompt if not isinstance(part, int))


def _message(message: ChatMessage) -> Mapping[str, str]:
    content = message.content if isinstance(message.content, str) else "\n".join(part.text for part in message.content)
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content, **named}
