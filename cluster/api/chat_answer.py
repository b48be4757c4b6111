"""What one answer of a chat is made of, piece by piece, for whichever form it is written in."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.answer import Token
from cluster.api.chat_parts import ContentReader, Part, Reader, ReasoningReader
from cluster.api.service import Plan, TextDelta
from cluster.api.tool_calls import CallListReader, NamedCallReader, ToolCallReader
from cluster.api.tools import NamedTool, Tool, ToolChoice


@dataclass(frozen=True)
class ChatForm:
    """How the text of an answer is to be read."""

    reads_calls: bool = False
    called: str | None = None  # the function whose arguments the whole answer is
    is_call_list: bool = False
    is_parallel: bool = True
    reads_reasoning: bool = True
    opens_thinking: bool = False


def chat_form(plan: Plan, tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ChatForm:
    """A constrained answer has no room for reasoning, nor for calls unless these are the constraint."""
    is_free = plan.requests[0].sampling.constraint is None
    return ChatForm(
        reads_calls=is_free and bool(tools) and choice in (None, "auto"),
        called=choice.function.name if isinstance(choice, NamedTool) else None,
        is_call_list=choice == "required",
        is_parallel=parallel is not False,
        reads_reasoning=is_free,
        opens_thinking=plan.opens_thinking,
    )


class ChatAnswer:
    """Deltas in, parts out. `call_ids` has an id for each call so far."""

    def __init__(self, form: ChatForm) -> None:
        self._form = form
        inner = _reader(form)
        self._reasoning = ReasoningReader(inner, opened=form.opens_thinking) if form.reads_reasoning else None
        self._reader: Reader = inner if self._reasoning is None else self._reasoning
        self._token_starts: list[int] = []
        self.call_ids: list[str] = []

    def push(self, delta: TextDelta) -> list[Part]:
        """The parts that a delta completes; the last delta brings the rest."""
        self._token_starts += [token.start for token in delta.tokens]
        parts = self._reader.push(delta.text)
        if delta.finish is not None:
            parts += self._reader.flush()
        if not self._form.is_parallel:
            parts = [part for part in parts if part.index == 0]
        self.call_ids += [f"call_{uuid.uuid4().hex[:24]}" for part in parts if part.name is not None]
        return parts

    def finish(self, delta: TextDelta) -> str | None:
        """OpenAI's reason: an answer that called and was not cut ends for the calls."""
        return "tool_calls" if delta.finish == "stop" and self.call_ids else delta.finish

    def is_content(self, token: Token) -> bool:
        """Whether a token of a delta that was pushed is of neither reasoning nor a call."""
        if self.call_ids:
            return False
        if self._reasoning is None or not self._reasoning.thinks:
            return True
        return self._reasoning.end is not None and self._reasoning.end <= token.start

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the reasoning with its marks."""
        if self._reasoning is None or not self._reasoning.thinks:
            return 0
        end = self._reasoning.end
        return len(self._token_starts) if end is None else sum(start < end for start in self._token_starts)


def _reader(form: ChatForm) -> Reader:
    if form.called is not None:
        return NamedCallReader(form.called)
    if form.is_call_list:
        return CallListReader()
    return ToolCallReader() if form.reads_calls else ContentReader()
