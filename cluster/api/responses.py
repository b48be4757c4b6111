"""What /v1/responses takes, in its basic form: text in, text, reasoning and function calls out, nothing stored."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from cluster.api.chat import called_earlier, hold_to_calls
from cluster.api.constraints import json_schema_constraint
from cluster.api.openai import NotServed, check_stream_options, show_bounds
from cluster.api.schema import Schema
from cluster.api.service import Call
from cluster.api.tools import ChosenFunction, FunctionDefinition, FunctionName, NamedTool, Tool, ToolChoice, offered
from router.errors import InvalidRequest
from router.request import Constraint

LOGPROBS = "message.output_text.logprobs"


class ContentPart(Schema):
    """A piece of text. What an answer's parts have beside it is taken back as it was sent."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Ignored.")
    logprobs: list[Any] | None = Field(None, description="Ignored.")


class InputItem(Schema):
    """A message, a call of an earlier turn, or what came of it. Reasoning of earlier turns may stand between and is left out."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="Of a message.")
    content: str | list[ContentPart] | list[dict[str, Any]] | None = Field(None, description="Of a message.")
    call_id: str | None = Field(None, description="Of a call and its output.")
    name: str | None = Field(None, description="Of a call.")
    arguments: str | None = Field(None, description="Of a call, as JSON text.")
    output: str | list[ContentPart] | None = Field(None, description="Of a call's output.")
    id: str | None = Field(None, description="Ignored.")
    status: str | None = Field(None, description="Ignored.")
    phase: str | None = Field(None, description="Ignored.")
    summary: list[Any] | None = Field(None, description="Ignored.")
    encrypted_content: str | None = Field(None, description="Ignored.")


class TextFormat(Schema):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, description="Ignored: it is the client's own word.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Of json_schema; none: any object.")
    description: str | None = Field(None, description="Ignored: say it in the instructions.")
    strict: bool | None = Field(None, description="Ignored: an answer is always held to the schema.")


class TextSettings(Schema):
    """Of the answer's text."""

    format: TextFormat | None = None
    verbosity: NotServed = None


class ResponseTool(Schema):
    """A function; other kinds of tools are not served."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the type object; none: no arguments.")
    strict: bool | None = Field(None, description="Ignored: a forced call is always held to the schema, a free one never.")

    def as_tool(self) -> Tool:
        """In the form that chat has."""
        function = FunctionDefinition(name=self.name, description=self.description, parameters=self.parameters, strict=None)
        return Tool(type="function", function=function)


class NamedFunction(Schema):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class ResponseStreamOptions(Schema):
    """Of a streamed answer."""

    include_obfuscation: bool | None = Field(None, description="Ignored: nothing is padded.")


class ResponsesRequest(Schema):
    """POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=show_bounds)

    model: str = Field(description="The model's id, as /v1/models has it.")
    input: str | list[InputItem] = Field(description="What the user says, or the conversation so far.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens of the answer, reasoning included.")
    temperature: float | None = Field(None, description="0 takes the likeliest token each time; 1 if left out.")
    top_p: float | None = Field(None, description="Draws from the likeliest tokens that have this share together.")
    presence_penalty: float | None = Field(None, description="Taken from the logit of each token generated before.")
    frequency_penalty: float | None = Field(None, description="Taken from a token's logit as often as it was generated before.")
    stream: bool | None = Field(None, description="Sends the answer as server-sent events while it is made.")
    stream_options: ResponseStreamOptions | None = Field(None, description="Only with stream.")
    text: TextSettings | None = Field(None, description="Holds the answer to JSON: any object, or a schema's.")
    tools: list[ResponseTool] | None = Field(None, max_length=128, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = Field(
        None, description="auto: as the model likes; none; required, or a function by name: the answer is held to a call."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, description="message.output_text.logprobs sends log-probabilities; reasoning is sent in the open."
    )
    top_logprobs: int | None = Field(None, ge=0, le=20, description="So many alternatives to each token; needs the include.")
    metadata: dict[str, str] | None = Field(None, description="Sent back with the answer.")
    truncation: Literal["disabled"] | None = Field(None, description="An input that is too long is refused.")
    store: Literal[False] | None = Field(None, description="False is how it is: nothing is stored.")
    background: Literal[False] | None = Field(None, description="False is how it is.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Ignored: there is one tier.")
    user: str | None = Field(None, description="Ignored: who asks is told by the key.")
    safety_identifier: str | None = Field(None, description="Ignored, as user is; sent back with the answer.")
    prompt_cache_key: str | None = Field(None, description="Ignored; sent back with the answer.")
    prompt_cache_options: NotServed = None
    prompt_cache_retention: NotServed = None
    reasoning: NotServed = None
    previous_response_id: NotServed = None
    conversation: NotServed = None
    prompt: NotServed = None
    max_tool_calls: NotServed = None
    context_management: NotServed = None
    background_options: NotServed = None
    moderation: NotServed = None
    access_programs: NotServed = None
    image: NotServed = None

    @property
    def chat_tools(self) -> list[Tool] | None:
        """In the form that chat has; none for an empty list."""
        return [tool.as_tool() for tool in self.tools or ()] or None

    @property
    def chat_tool_choice(self) -> ToolChoice | None:
        """In the form that chat has."""
        if isinstance(self.tool_choice, NamedFunction):
            return NamedTool(type="function", function=ChosenFunction(name=self.tool_choice.name))
        return self.tool_choice

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are to be sent."""
        return LOGPROBS in (self.include or ())


def responses_call(body: ResponsesRequest, request_id: str, deadline_s: float | None, deadline_name: str) -> Call:
    """The call that a request means. InvalidRequest where its fields contradict each other."""
    check_stream_options(body.stream, body.stream_options)
    names = {"deadline_s": deadline_name, "prompt": "input", "messages": "input", "max_tokens": "max_output_tokens"}
    names |= {"logprobs": "top_logprobs", "constraint": "text.format"}
    same = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    sampling: dict[str, Any] = {name: getattr(body, name) for name in same}
    sampling["max_tokens"] = body.max_output_tokens
    sampling["constraint"] = _constraint(body.text)
    if body.top_logprobs is not None and not body.has_logprobs:
        raise InvalidRequest(f"top_logprobs: needs {LOGPROBS} in include.", field="top_logprobs")
    if body.has_logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    tools, choice = body.chat_tools, body.chat_tool_choice
    hold_to_calls(tools, choice, body.parallel_tool_calls, sampling, names, inside="")
    return Call(
        request_id,
        body.model,
        messages=(*_instructions(body.instructions), *_messages(body.input)),
        tools=offered(tools, choice),
        sampling=sampling,
        deadline_s=deadline_s,
        names=names,
    )


def _constraint(text: TextSettings | None) -> Constraint | None:
    wanted = None if text is None else text.format
    if wanted is None or wanted.type == "text":
        return None
    return json_schema_constraint(wanted.schema_ if wanted.type == "json_schema" else None)


def _instructions(instructions: str | None) -> tuple[dict[str, Any], ...]:
    return () if instructions is None else ({"role": "system", "content": instructions},)


def _messages(given: str | Sequence[InputItem]) -> list[dict[str, Any]]:
    """As chat templates read them: calls that follow each other are one turn of the assistant's."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        place = f"input[{index}]"
        if item.type == "message":
            role = _given(item, "role", place)
            messages.append({"role": "system" if role == "developer" else role, "content": _text(item.content, f"{place}.content")})
        elif item.type == "function_call":
            call = called_earlier(_given(item, "call_id", place), _given(item, "name", place), _given(item, "arguments", place), place)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            output = _text(item.output, f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": _given(item, "call_id", place), "content": output})
    return messages


def _given(item: InputItem, name: str, place: str) -> str:
    value: str | None = getattr(item, name)
    if value is None:
        raise InvalidRequest(f"{place}.{name}: is missing.", field=f"{place}.{name}")
    return value


def _text(content: str | Sequence[ContentPart | dict[str, Any]] | None, place: str) -> str:
    if content is None:
        raise InvalidRequest(f"{place}: is missing.", field=place)
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, ContentPart):
            raise InvalidRequest(f"{place}[{index}]: only text is served: of the type input_text.", field=f"{place}[{index}]")
        texts.append(part.text)
    return "\n".join(texts)
