"""An answer of a chat taken apart: reasoning, content and tool calls, whatever pieces its text comes in."""

from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["content", "reasoning", "call"]
THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one kind. The first of a call (`index` counts calls) has its function's name; `text` is of its arguments."""

    kind: Kind
    text: str
    index: int = 0
    name: str | None = None


class Reader(Protocol):
    """Takes text as it comes. The parts do not depend on where the text was cut."""

    def push(self, text: str) -> list[Part]:
        """What is certain by now."""
        ...

    def flush(self) -> list[Part]:
        """The rest, at the end."""
        ...


class ContentReader:
    """All of it is content."""

    def push(self, text: str) -> list[Part]:
        """See Reader."""
        return [Part("content", text)] if text else []

    def flush(self) -> list[Part]:
        """See Reader."""
        return []


class ReasoningReader:
    """Reasoning between <think> and </think> at the beginning, without the white space around it; the rest is for `inner`.

    `opened`: the prompt's own last word was <think> (DeepSeek-R1's template). A second <think> is then no part of the reasoning.
    """

    def __init__(self, inner: Reader, *, opened: bool) -> None:
        self._inner = inner
        self._opened = opened
        self._state: Literal["start", "thinking", "after", "inner"] = "start"
        self._held = ""
        self._num_characters = 0
        self._has_thought = False
        self.end: int | None = None  # characters of the text up to the end of </think>; None: not yet
        self.thinks = opened  # whether there is reasoning

    def push(self, text: str) -> list[Part]:
        """See Reader."""
        if self._state == "inner":
            return self._inner.push(text)
        self._num_characters += len(text)
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            self._start()
        if self._state == "thinking":
            self._think(parts)
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "inner"
        if self._state == "inner":
            held, self._held = self._held, ""
            parts += self._inner.push(held)
        return parts

    def flush(self) -> list[Part]:
        """See Reader."""
        parts: list[Part] = []
        if self._state == "start" and not self._opened:
            parts += self._inner.push(self._held)
        elif self._state in ("start", "thinking"):
            self._say(self._held, parts)
        self._held = ""
        return parts + self._inner.flush()

    def _start(self) -> None:
        beginning = self._held.lstrip()
        if beginning.startswith(THINK):
            self.thinks = True
            self._state, self._held = "thinking", beginning[len(THINK) :]
        elif not THINK.startswith(beginning):
            self._state = "thinking" if self._opened else "inner"

    def _think(self, parts: list[Part]) -> None:
        thought, found, rest = self._held.partition(END_THINK)
        if found:
            self._say(thought.rstrip(), parts)
            self.end = self._num_characters - len(rest)
            self._state, self._held = "after", rest
            return
        safe = self._held[: len(self._held) - len(beginning_of((END_THINK,), self._held))].rstrip()
        self._say(safe, parts)
        self._held = self._held[len(safe) :]

    def _say(self, text: str, parts: list[Part]) -> None:
        text = text if self._has_thought else text.lstrip()
        if text:
            self._has_thought = True
            parts.append(Part("reasoning", text))


def beginning_of(markers: tuple[str, ...], text: str) -> str:
    """The longest end of `text` that may be the beginning of a marker, and is not a whole one."""
    for length in range(min(max(map(len, markers)) - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return text[-length:]
    return ""
