"""Answers of a chat in OpenAI's form: content, reasoning and tool calls in fields of their own."""

from collections.abc import Sequence
from typing import Any

from cluster.api.answer import Token
from cluster.api.chat import ChatCompletionRequest
from cluster.api.chat_answer import ChatAnswer, chat_form
from cluster.api.chat_parts import Part
from cluster.api.rendering import prompt_logprobs, token_text, usage_of
from cluster.api.service import Plan, TextDelta
from model.tokenizer import Tokenizer
from router.request import TokenLogprob


class ChatRendering:
    """Of /v1/chat/completions. Keeps which answers have begun, since the first piece carries the role."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, body: ChatCompletionRequest, plan: Plan, tokenizer: Tokenizer | None) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._begun: set[int] = set()
        form = chat_form(plan, body.tools, body.tool_choice, body.parallel_tool_calls)
        self._answers = [ChatAnswer(form) for _ in plan.requests]

    def choice(self, delta: TextDelta, *, streamed: bool) -> dict[str, Any] | None:
        """See Rendering."""
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        answer = self._answers[delta.index]
        parts = answer.push(delta)
        if self._body.include_reasoning is False:
            parts = [part for part in parts if part.kind != "reasoning"]
        shows_tokens = bool(self._body.logprobs) or bool(self._body.return_token_ids)
        if not (first or parts or delta.finish or delta.prompt_logprobs or (delta.tokens and shows_tokens)):
            return None
        choice: dict[str, Any] = {"index": delta.index}
        if streamed:
            choice["delta"] = ({"role": "assistant"} if first else {}) | _delta(parts, answer)
        else:
            choice["message"] = _message(parts, answer)
        choice["logprobs"] = {"content": [self.logprob(token) for token in delta.tokens], "refusal": None} if self._body.logprobs else None
        choice["finish_reason"] = answer.finish(delta)
        if delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, delta)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
            if first:
                choice["prompt_token_ids"] = self._plan.requests[delta.index].prompt_token_ids
        return choice

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """See Rendering. Says of how many tokens were reasoning, where any were."""
        usage = usage_of(self._plan, completion_tokens)
        num_reasoning = sum(answer.num_reasoning_tokens for answer in self._answers)
        return usage | ({"completion_tokens_details": {"reasoning_tokens": num_reasoning}} if num_reasoning else {})

    def logprob(self, token: Token) -> dict[str, Any]:
        """A token of the answer with its alternatives."""
        return token_logprob(self._tokenizer, token, self._body.top_logprobs or 0)


def token_logprob(tokenizer: Tokenizer | None, token: Token, num_top: int) -> dict[str, Any]:
    """OpenAI's entry for a token, with so many alternatives."""
    position = token.logprobs
    if position is None:
        return _entry(tokenizer, TokenLogprob(token.token_id, 0.0, 1)) | {"top_logprobs": []}
    return _entry(tokenizer, position.chosen) | {"top_logprobs": [_entry(tokenizer, other) for other in position.top[:num_top]]}


def _entry(tokenizer: Tokenizer | None, token: TokenLogprob) -> dict[str, Any]:
    raw = b"" if tokenizer is None else tokenizer.token_bytes(token.token_id)
    return {"token": token_text(tokenizer, token.token_id), "logprob": token.logprob, "bytes": list(raw)}


def _text(parts: Sequence[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def _delta(parts: Sequence[Part], answer: ChatAnswer) -> dict[str, Any]:
    reasoning = _text(parts, "reasoning")
    calls = [_call_delta(part, answer) for part in parts if part.kind == "call"]
    content = _text(parts, "content")
    delta: dict[str, Any] = {} if (reasoning or calls) and not content else {"content": content}
    if reasoning:
        delta["reasoning_content"] = reasoning
    if calls:
        delta["tool_calls"] = calls
    return delta


def _call_delta(part: Part, answer: ChatAnswer) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.text}}
    named = {"name": part.name, "arguments": part.text}
    return {"index": part.index, "id": answer.call_ids[part.index], "type": "function", "function": named}


def _message(parts: Sequence[Part], answer: ChatAnswer) -> dict[str, Any]:
    content = _text(parts, "content")
    reasoning = _text(parts, "reasoning")
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if answer.call_ids else "")}
    if reasoning:
        message["reasoning_content"] = reasoning
    if answer.call_ids:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, (name, arguments) in zip(answer.call_ids, calls_of(parts), strict=True)
        ]
    return message | {"refusal": None, "annotations": []}


def calls_of(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Name and arguments of each call; a call without arguments has the empty object."""
    calls: dict[int, list[str]] = {}
    for part in parts:
        if part.kind == "call":
            call = calls.setdefault(part.index, [part.name or "", ""])
            call[1] += part.text
    return [(name, arguments or "{}") for name, arguments in calls.values()]
