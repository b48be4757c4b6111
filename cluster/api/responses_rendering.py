"""An answer of /v1/responses: its items as they grow, and the events that tell of it."""

import uuid
from collections.abc import Mapping
from typing import Any

from cluster.api.answer import Token
from cluster.api.chat_answer import ChatAnswer, chat_form
from cluster.api.chat_parts import Part
from cluster.api.chat_rendering import token_logprob
from cluster.api.rendering import dumps
from cluster.api.responses import ResponsesRequest
from cluster.api.service import Plan, TextDelta
from model.tokenizer import Tokenizer

Event = dict[str, Any]
Item = dict[str, Any]
ITEM_OF = {"content": "message", "reasoning": "reasoning", "call": "function_call"}
ID_PREFIX = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponseRendering:
    """Builds one response. Every step gives its events; `response` is the whole as it stands."""

    def __init__(self, body: ResponsesRequest, plan: Plan, tokenizer: Tokenizer | None, model_id: str, created: int) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._answer = ChatAnswer(chat_form(plan, body.chat_tools, body.chat_tool_choice, body.parallel_tool_calls))
        self._num_events = 0
        self._item: Item | None = None
        self._call_index = -1
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still to come
        self.response: dict[str, Any] = _empty_response(body, plan, model_id, created)

    def begin(self) -> list[Event]:
        """Before the first delta."""
        return [
            self._event("response.created", response=dict(self.response)),
            self._event("response.in_progress", response=dict(self.response)),
        ]

    def push(self, delta: TextDelta, now: int) -> list[Event]:
        """What a delta adds; the last one completes the response. `now` in Unix seconds."""
        events: list[Event] = []
        parts = self._answer.push(delta)
        if self._body.has_logprobs:
            self._logprobs += [self._logprob(token) for token in delta.tokens if self._answer.is_content(token)]
        for part in parts:
            self._add(part, events)
        if delta.finish is not None:
            if self._item is None and not self.response["output"]:
                self._open("message", None, events)
            self._close(events, is_cut=delta.finish == "length")
            self._complete(delta, now)
            kind = "response.incomplete" if delta.finish == "length" else "response.completed"
            events.append(self._event(kind, response=self.response))
        return events

    def failed(self, error: Mapping[str, Any]) -> Event:
        """The last event of an answer that could not be completed; `error` has message, code and param."""
        flat = {"code": error["code"], "message": error["message"], "param": error["param"]}
        return self._event("error", error=dict(error), **flat)

    def _add(self, part: Part, events: list[Event]) -> None:
        kind = ITEM_OF[part.kind]
        if self._item is None or self._item["type"] != kind or part.name is not None:
            self._close(events)
            self._open(kind, part.name, events)
        if not part.text:
            return
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": self._output_index}
        if kind == "function_call":
            self._item["arguments"] += part.text
            events.append(self._event("response.function_call_arguments.delta", **place, delta=part.text))
            return
        content = self._item["content"][0]
        content["text"] += part.text
        place["content_index"] = 0
        if kind == "reasoning":
            events.append(self._event("response.reasoning_text.delta", **place, delta=part.text))
            return
        logprobs, self._logprobs = self._logprobs, []
        content["logprobs"] += logprobs
        events.append(self._event("response.output_text.delta", **place, delta=part.text, logprobs=logprobs))

    def _open(self, kind: str, name: str | None, events: list[Event]) -> None:
        item: Item = {"id": ID_PREFIX[kind] + uuid.uuid4().hex, "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            self._call_index += 1
            item |= {"call_id": self._answer.call_ids[self._call_index], "name": name or "", "arguments": ""}
        self._item = item
        self.response["output"].append(item)
        events.append(self._event("response.output_item.added", output_index=self._output_index, item=_copy(item)))
        if kind == "function_call":
            return
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        place = {"item_id": item["id"], "output_index": self._output_index, "content_index": 0}
        events.append(self._event("response.content_part.added", **place, part=_copy(part)))

    def _close(self, events: list[Event], *, is_cut: bool = False) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        item["status"] = "incomplete" if is_cut else "completed"
        place: dict[str, Any] = {"item_id": item["id"], "output_index": self._output_index}
        if item["type"] == "function_call":
            item["arguments"] = item["arguments"] or "{}"
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **place, **done))
        else:
            place["content_index"] = 0
            part = item["content"][0]
            if item["type"] == "message":
                part["logprobs"] += self._logprobs
                self._logprobs = []
                events.append(self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]))
            else:
                events.append(self._event("response.reasoning_text.done", **place, text=part["text"]))
            events.append(self._event("response.content_part.done", **place, part=part))
        events.append(self._event("response.output_item.done", output_index=self._output_index, item=item))

    def _complete(self, delta: TextDelta, now: int) -> None:
        is_cut = delta.finish == "length"
        self.response["status"] = "incomplete" if is_cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["completed_at"] = None if is_cut else now
        if delta.usage is not None:
            read, written = delta.usage.prompt_tokens, delta.usage.completion_tokens
            self.response["usage"] = {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": written,
                "output_tokens_details": {"reasoning_tokens": self._answer.num_reasoning_tokens},
                "total_tokens": read + written,
            }

    @property
    def _output_index(self) -> int:
        return len(self.response["output"]) - 1

    def _logprob(self, token: Token) -> dict[str, Any]:
        return token_logprob(self._tokenizer, token, self._body.top_logprobs or 0)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def response_event(event: Event) -> bytes:
    """One server-sent event, which these streams name."""
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + dumps(event) + b"\n\n"


def _copy(item: Item) -> Item:
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


def _empty_response(body: ResponsesRequest, plan: Plan, model_id: str, created: int) -> dict[str, Any]:
    sampling = plan.requests[0].sampling
    wanted = None if body.text is None or body.text.format is None else body.text.format
    text_format = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
    if text_format["type"] == "json_schema":
        text_format = {"name": "answer", "schema": {"type": "object"}, "strict": True, "description": None} | text_format
    choice = body.tool_choice or "auto"
    return {
        "id": f"resp_{plan.call.request_id}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model_id,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "text": {"format": text_format},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
