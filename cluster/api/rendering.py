"""Answers in OpenAI's form: plain dicts, built by hand, since they are built for every token."""

import json
from collections.abc import Iterable
from typing import Any, Protocol

from cluster.api.answer import Token
from cluster.api.openai import CompletionRequest
from cluster.api.service import Plan, TextDelta
from model.tokenizer import Tokenizer
from router.request import PositionLogprobs

_ENCODER = json.JSONEncoder(separators=(",", ":"))


class Rendering(Protocol):
    """How one endpoint writes its answers."""

    object_name: str
    chunk_object_name: str
    id_prefix: str

    def choice(self, delta: TextDelta, *, streamed: bool) -> dict[str, Any] | None:
        """The choice that this delta is, or adds to; None if there is nothing to send yet."""
        ...

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """Of all answers, once they are complete."""
        ...


class CompletionRendering:
    """Of /v1/completions. Keeps which answers have begun, since the first piece carries the echo."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, body: CompletionRequest, plan: Plan, tokenizer: Tokenizer | None) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._begun: set[int] = set()
        self._awaits_prompt = any(request.sampling.prompt_logprobs is not None for request in plan.requests)

    def choice(self, delta: TextDelta, *, streamed: bool) -> dict[str, Any] | None:  # noqa: ARG002 - both forms are alike here
        """See Rendering."""
        first = delta.index not in self._begun
        if first and self._awaits_prompt and delta.prompt_logprobs is None and delta.finish is None:
            return None
        shows_tokens = self._body.logprobs is not None or bool(self._body.return_token_ids)
        if not (delta.text or delta.finish or (delta.tokens and shows_tokens) or (first and (self._body.echo or self._awaits_prompt))):
            return None
        self._begun.add(delta.index)
        echo = self._echoed(delta.index) if self._body.echo else ""
        choice: dict[str, Any] = {"index": delta.index, "text": (echo if first else "") + delta.text, "logprobs": None}
        if self._body.logprobs is not None:
            prompt = self._prompt_tokens(delta) if first and self._body.echo else []
            generated = [(token.token_id, token.logprobs, token.start + len(echo)) for token in delta.tokens]
            choice["logprobs"] = self._logprobs(prompt + generated)
        choice["finish_reason"] = delta.finish
        if self._body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, delta)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
            if first:
                choice["prompt_token_ids"] = self._prompt_ids(delta.index)
        return choice

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """See Rendering."""
        return usage_of(self._plan, completion_tokens)

    def _prompt_ids(self, index: int) -> tuple[int, ...]:
        return self._plan.requests[index].prompt_token_ids

    def _echoed(self, index: int) -> str:
        if self._plan.call.prompts:
            prompt = self._plan.call.prompts[index // self._plan.call.n]
            if isinstance(prompt, str):
                return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(self._prompt_ids(index))

    def _prompt_tokens(self, delta: TextDelta) -> list[tuple[int, PositionLogprobs | None, int]]:
        ids = self._prompt_ids(delta.index)
        known = delta.prompt_logprobs or (None,) * len(ids)
        offset, tokens = 0, []
        for token_id, position in zip(ids, known, strict=True):
            tokens.append((token_id, position, offset))
            offset += 0 if self._tokenizer is None else len(self._tokenizer.decode((token_id,)))
        return tokens

    def _logprobs(self, tokens: Iterable[tuple[int, PositionLogprobs | None, int]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, position, offset in tokens:
            columns["tokens"].append(token_text(self._tokenizer, token_id))
            columns["text_offset"].append(offset)
            columns["token_logprobs"].append(None if position is None else position.chosen.logprob)
            columns["top_logprobs"].append(
                None
                if position is None
                else {token_text(self._tokenizer, t.token_id): t.logprob for t in (position.chosen, *position.top[: self._body.logprobs])}
            )
        return columns


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""A token as a string: its text, `bytes:\x..` where it is part of a character, its number where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(tokenizer: Tokenizer | None, delta: TextDelta) -> list[dict[str, dict[str, Any]] | None]:
    """Log-probabilities of the prompt's tokens in vLLM's form; null for the first."""
    return [
        None
        if position is None
        else {
            str(token.token_id): {"logprob": token.logprob, "rank": token.rank, "decoded_token": token_text(tokenizer, token.token_id)}
            for token in (position.chosen, *position.top)
        }
        for position in delta.prompt_logprobs or ()
    ]


def join(deltas: Iterable[TextDelta]) -> TextDelta:
    """All deltas of one answer as one."""
    text: list[str] = []
    tokens: list[Token] = []
    index, prompt = 0, None
    finish = usage = timing = None
    for delta in deltas:
        index = delta.index
        text.append(delta.text)
        tokens += delta.tokens
        prompt = prompt if delta.prompt_logprobs is None else delta.prompt_logprobs
        finish, usage, timing = delta.finish, delta.usage, delta.timing
    return TextDelta(index, "".join(text), tuple(tokens), prompt, finish, usage, timing)


def usage_of(plan: Plan, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage: each prompt counts once, however many answers it has."""
    prompt_tokens = sum(map(len, plan.prompts))
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def dumps(value: Any) -> bytes:
    """Compact JSON; ASCII only, so that a client's lone surrogates cannot break it."""
    return _ENCODER.encode(value).encode()
