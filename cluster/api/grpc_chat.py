"""Chat over gRPC: a ChatRequest as a call, and its answers taken apart into content, reasoning and calls, as over HTTP."""

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.api.chat import ChatMessage, hold_to_calls, messages_of
from cluster.api.chat_answer import ChatAnswer, chat_form
from cluster.api.grpc_messages import FINISH, Asked, call_of, delta_message, sampling_values
from cluster.api.proto.shoal.v1 import inference_pb2
from cluster.api.schema import Schema
from cluster.api.service import Call, Plan, TextDelta
from cluster.api.tools import NamedTool, Tool, ToolChoice, offered
from model.tokenizer import Tokenizer
from router.errors import InvalidRequest

MODES: dict[int, ToolChoice] = {inference_pb2.TOOL_MODE_NONE: "none", inference_pb2.TOOL_MODE_REQUIRED: "required"}
MAX_TOOLS = 128
S = TypeVar("S", bound=Schema)


def chat_call(request: Any, asked: Asked) -> Call:
    """What a ChatRequest asks for. InvalidRequest naming the field."""
    tools, choice = _tools(request), _choice(request)
    sampling, names = sampling_values(request.sampling), {"constraint": f"sampling.{request.sampling.WhichOneof('constraint')}"}
    hold_to_calls(tools, choice, _is_parallel(request), sampling, names, "")
    messages = messages_of([_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)])
    return call_of(request, asked, names, messages=messages, tools=offered(tools, choice), sampling=sampling)


class ChatDeltas:
    """TextDeltas of one call in, Deltas out."""

    def __init__(self, request: Any, plan: Plan, tokenizer: Tokenizer | None) -> None:
        form = chat_form(
            plan, _tools(request), _choice(request), request.parallel_tool_calls or not request.HasField("parallel_tool_calls")
        )
        self._answers = [ChatAnswer(form) for _ in plan.requests]
        self._request_id = plan.call.request_id
        self._tokenizer = tokenizer

    def message(self, delta: TextDelta) -> Any:
        """What one adds; None where it adds nothing yet."""
        answer = self._answers[delta.index]
        num_calls = len(answer.call_ids)
        parts = answer.push(delta)
        if not (parts or delta.tokens or delta.finish or delta.prompt_logprobs is not None):
            return None
        message = delta_message(delta, self._request_id, self._tokenizer)
        message.text = "".join(part.text for part in parts if part.kind == "content")
        message.reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        for part in parts:
            if part.kind == "call":
                piece = message.tool_calls.add(index=part.index, arguments=part.text)
                if part.name is not None:
                    piece.id, piece.name = answer.call_ids[num_calls], part.name
                    num_calls += 1
        if answer.finish(delta) == "tool_calls":
            message.finish_reason = inference_pb2.FINISH_REASON_TOOL_CALLS
        elif delta.finish is not None:
            message.finish_reason = FINISH[delta.finish]
        return message


def _message(message: Any, place: str) -> ChatMessage:
    calls = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls]
    has_content = message.content or message.role != "assistant" or not (calls or message.reasoning)
    fields = {
        "role": message.role,
        "content": message.content if has_content else None,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id or None,
        "reasoning_content": message.reasoning or None,
    }
    return _read(ChatMessage, fields, place)


def _tools(request: Any) -> list[Tool] | None:
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools: has {len(request.tools)}; at most {MAX_TOOLS} are allowed.", field="tools")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools)] or None


def _tool(tool: Any, place: str) -> Tool:
    try:
        parameters = json.loads(tool.parameters) if tool.parameters else None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{place}.parameters: is not JSON: {error}.", field=f"{place}.parameters") from error
    function = {"name": tool.name, "description": tool.description or None, "parameters": parameters}
    return _read(Tool, {"type": "function", "function": function}, place)


def _choice(request: Any) -> ToolChoice | None:
    if request.tool_choice.WhichOneof("choice") == "function":
        return NamedTool.model_validate({"type": "function", "function": {"name": request.tool_choice.function}})
    return MODES.get(request.tool_choice.mode)


def _is_parallel(request: Any) -> bool:
    return bool(request.parallel_tool_calls) or not request.HasField("parallel_tool_calls")


def _read(kind: type[S], fields: dict[str, Any], place: str) -> S:
    """A message's fields as the schema that HTTP has for them. InvalidRequest naming the first that is wrong, as the .proto has it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = [f"[{word}]" if isinstance(word, int) else f".{word}" for word in first["loc"] if word != "function"]
        name = place + "".join(words)
        raise InvalidRequest(f"{name}: {first['msg']}.", field=name) from error
