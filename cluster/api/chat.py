"""What OpenAI's chat API takes, as schemas, and the call that a request means."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from cluster.api.openai import GenerationRequest, NotServed, check_stream_options, sampling_of, stops_of
from cluster.api.schema import Schema
from cluster.api.service import Call
from cluster.api.tools import Tool, ToolChoice, check_tools, forced_calls, offered
from router.errors import InvalidRequest

# What tokenizers' own rendering takes beside a template's variables: not a client's to set.
RESERVED_VARIABLES = frozenset(
    ("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")
) | frozenset(("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"))


class TextPart(Schema):
    """A part of a message; text is the only kind that is served."""

    type: Literal["text"]
    text: str


class FunctionCall(Schema):
    """What a model called."""

    name: str
    arguments: str = Field(description="As JSON text.")


class ToolCall(Schema):
    """A call of an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="Ignored: as chunks have it.")


class ChatMessage(Schema):
    """One turn of a conversation. The fields that only answers have are taken back as they were sent."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(None, description="May be left out by an assistant that called tools.")
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Of an assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call that this answers.")
    reasoning_content: str | None = Field(None, description="Of an assistant; what the chat template makes of it is its affair.")
    refusal: str | None = Field(None, description="Ignored.")
    annotations: list[Any] | None = Field(None, description="Ignored.")
    audio: NotServed = None
    function_call: NotServed = None


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(description="The conversation, to the turn that is to be answered.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Sends the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And so many alternatives to it; needs logprobs.")
    tools: list[Tool] | None = Field(None, min_length=1, max_length=128, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="auto: as the model likes; none; required, or a function by name: the answer is held to a call."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most.")
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(
        None, description="Variables for the chat template, such as thinking."
    )
    include_reasoning: bool | None = Field(None, description="False: reasoning is not sent.")
    store: Literal[False] | None = Field(None, description="False is how it is: nothing is stored.")
    modalities: list[Literal["text"]] | None = Field(None, description="Text is what there is.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Ignored: there is one tier.")
    metadata: dict[str, str] | None = Field(None, description="Ignored: it goes with what is stored.")
    safety_identifier: str | None = Field(None, description="Ignored, as user is.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    prompt_cache_options: NotServed = None
    prompt_cache_retention: NotServed = None
    functions: NotServed = None
    function_call: NotServed = None
    audio: NotServed = None
    prediction: NotServed = None
    moderation: NotServed = None
    reasoning_effort: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None


def chat_call(body: ChatCompletionRequest, request_id: str, deadline_s: float | None, deadline_name: str) -> Call:
    """The call that a chat request means. InvalidRequest where its fields contradict each other."""
    check_stream_options(body.stream, body.stream_options)
    names = {"deadline_s": deadline_name, "logprobs": "top_logprobs", "prompt": "messages"}
    sampling = sampling_of(body, names)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest("max_tokens: differs from max_completion_tokens; give one of them.", field="max_tokens")
        sampling["max_tokens"] = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true.", field="top_logprobs")
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    hold_to_calls(body.tools, body.tool_choice, body.parallel_tool_calls, sampling, names)
    return Call(
        request_id,
        body.model,
        messages=messages_of(body.messages),
        tools=offered(body.tools, body.tool_choice),
        template_variables=template_variables(body.chat_template_kwargs),
        sampling=sampling,
        stop=stops_of(body.stop),
        n=1 if body.n is None else body.n,
        deadline_s=deadline_s,
        names=names,
    )


def hold_to_calls(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    parallel: bool | None,
    sampling: dict[str, Any],
    names: dict[str, str],
    inside: str = ".function",
) -> None:
    """Checks the tools, and puts the constraint of a forced call among the sampling parameters."""
    check_tools(tools, choice, inside)
    forced = forced_calls(tools, choice, parallel is not False)
    if forced is None:
        return
    if sampling.get("constraint") is not None:
        raise InvalidRequest(f"tool_choice: the answer is held to {names['constraint']} already; give one of them.", field="tool_choice")
    names["constraint"] = "tools"
    sampling["constraint"] = forced


def template_variables(given: dict[str, bool | int | float | str | None] | None) -> dict[str, Any]:
    """InvalidRequest for one that is not a template's."""
    for name in given or {}:
        if name in RESERVED_VARIABLES or not name.isidentifier():
            raise InvalidRequest(f"chat_template_kwargs: {name[:64]!r} is not a variable to set.", field="chat_template_kwargs")
    return dict(given or {})


def messages_of(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """As chat templates read them: arguments of calls as objects, `developer` by its older name. InvalidRequest."""
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: ChatMessage, place: str) -> dict[str, Any]:
    content = message.content if not isinstance(message.content, list) else "\n".join(part.text for part in message.content)
    if content is None and not (message.role == "assistant" and (message.tool_calls or message.reasoning_content)):
        raise InvalidRequest(f"{place}.content: is missing.", field=f"{place}.content")
    for name, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and message.role != role:
            raise InvalidRequest(f"{place}.{name}: is for the role {role}.", field=f"{place}.{name}")
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            out[name] = getattr(message, name)
    if message.tool_calls:
        out["tool_calls"] = [
            called_earlier(call.id, call.function.name, call.function.arguments, f"{place}.tool_calls[{index}].function")
            for index, call in enumerate(message.tool_calls)
        ]
    return out


def called_earlier(call_id: str, name: str, arguments: str, place: str) -> dict[str, Any]:
    """A call of an earlier turn as templates read it: they write the arguments, an object, as JSON themselves. InvalidRequest."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place}.arguments: must be an object as JSON text.", field=f"{place}.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": value}}
