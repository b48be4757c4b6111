"""Tool calls in the text of an answer: DeepSeek's tokens, the <tool_call> tags of others, and the JSON of a forced call."""

import json
import re
from typing import Any, Literal

from cluster.api.chat_parts import Part, beginning_of

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
TAG_BEGIN, TAG_END = "<tool_call>", "</tool_call>"
BEGINNINGS = (CALLS_BEGIN, CALL_BEGIN, TAG_BEGIN)
BETWEEN = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, TAG_BEGIN)
# V2 to R1 write: function SEPARATOR name, newline, ```json, arguments, ```; V3.1 writes: name SEPARATOR arguments.
FENCED_NAME = re.compile(r"\s*(\S[^\n]*?)[ \t]*\n\s*```(?:json)?[ \t]*\n")
FENCE_END = re.compile(r"\s*(?:```)?\s*$")
MAY_END = re.compile(r"[\s`]*$")


class ToolCallReader:
    """Content, then calls wherever the model puts them. What looks like a call and is none stays content."""

    def __init__(self) -> None:
        self._state: Literal["content", "between", "head", "name", "arguments", "tag"] = "content"
        self._held = ""
        self._num_calls = 0
        self._is_fenced = False
        self._has_arguments = False

    def push(self, text: str) -> list[Part]:
        """See Reader."""
        self._held += text
        parts: list[Part] = []
        steps = {
            "content": self._content,
            "between": self._between,
            "head": self._head,
            "name": self._name,
            "arguments": self._arguments,
            "tag": self._tag,
        }
        while steps[self._state](parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """See Reader. A call that was cut keeps the arguments that it has; one that was cut before its name is content."""
        held, self._held = self._held, ""
        if self._state == "arguments":
            # Of `CALL_END` only a beginning can be here, which is no argument.
            held = held[: len(held) - len(beginning_of((CALL_END,), held))]
            return self._argue(FENCE_END.sub("", held) if self._is_fenced else held.rstrip())
        if self._state == "tag":
            return self._tagged(held)
        if self._state in ("head", "name"):
            return [Part("content", CALL_BEGIN + held)]
        if self._state == "between":
            return []
        return [Part("content", held)] if held else []

    def _content(self, parts: list[Part]) -> bool:
        found = [at for marker in BEGINNINGS if (at := self._held.find(marker)) >= 0]
        if found:
            at = min(found)
            self._say(self._held[:at].rstrip(), parts)
            self._held = self._held[at:]
            self._state = "between"
            return True
        # White space before a call is not content, so that it waits for what follows.
        keep = len(self._held) - len(beginning_of(BEGINNINGS, self._held))
        safe = self._held[:keep].rstrip()
        self._say(safe, parts)
        self._held = self._held[len(safe) :]
        return False

    def _between(self, parts: list[Part]) -> bool:  # noqa: ARG002 - a step like the others
        self._held = self._held.lstrip()
        for marker in BETWEEN:
            if self._held.startswith(marker):
                self._held = self._held[len(marker) :]
                if marker in (CALL_BEGIN, TAG_BEGIN):
                    self._state = "head" if marker == CALL_BEGIN else "tag"
                return True
        if self._held and not any(marker.startswith(self._held) for marker in BETWEEN):
            self._state = "content"
            return True
        return False

    def _head(self, parts: list[Part]) -> bool:
        head, found, rest = self._held.partition(SEPARATOR)
        if not found:
            return False
        self._held = rest
        self._is_fenced = head.strip() == "function"
        self._state = "name"
        if not head.strip():
            self._say(CALL_BEGIN + head + SEPARATOR, parts)
            self._state = "content"
        elif not self._is_fenced:
            self._call(head.strip(), parts)
        return True

    def _name(self, parts: list[Part]) -> bool:
        match = FENCED_NAME.match(self._held)
        if match is None:
            return False
        self._held = self._held[match.end() :]
        self._call(match[1], parts)
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        arguments, found, rest = self._held.partition(CALL_END)
        if found:
            parts += self._argue(FENCE_END.sub("", arguments) if self._is_fenced else arguments.rstrip())
            self._held = rest
            self._state = "between"
            return True
        keep = len(self._held) - len(beginning_of((CALL_END,), self._held))
        end = MAY_END.search(self._held[:keep])
        safe = self._held[: end.start() if end else keep]
        parts += self._argue(safe)
        self._held = self._held[len(safe) :]
        return False

    def _tag(self, parts: list[Part]) -> bool:
        inside, found, rest = self._held.partition(TAG_END)
        if not found:
            return False
        parts += self._tagged(inside)
        self._held = rest
        self._state = "between"
        return True

    def _tagged(self, inside: str) -> list[Part]:
        call = _object(inside)
        name = None if call is None else call.get("name")
        if call is None or not isinstance(name, str):
            return [Part("content", TAG_BEGIN + inside)]
        arguments = call.get("arguments", call.get("parameters", {}))
        self._num_calls += 1
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [Part("call", text, self._num_calls - 1, name)]

    def _call(self, name: str, parts: list[Part]) -> None:
        parts.append(Part("call", "", self._num_calls, name))
        self._num_calls += 1
        self._has_arguments = False
        self._state = "arguments"

    def _argue(self, text: str) -> list[Part]:
        text = text if self._has_arguments else text.lstrip()
        if not text:
            return []
        self._has_arguments = True
        return [Part("call", text, self._num_calls - 1)]

    @staticmethod
    def _say(text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Part("content", text))


class NamedCallReader:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[Part]:
        """See Reader."""
        if not text:
            return []
        name, self._name = self._name, None
        return [Part("call", text, 0, name)]

    def flush(self) -> list[Part]:
        """See Reader."""
        return []


class CallListReader:
    """The whole answer is a list of {"name", "parameters"}, in that order, as a constraint made it."""

    _HEAD = re.compile(r'\s*[\[,]?\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"parameters"\s*:\s*(?=\{)')
    _TAIL = re.compile(r"\s*\}")

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0
        self._value: _JsonObject | None = None

    def push(self, text: str) -> list[Part]:
        """See Reader."""
        self._held += text
        parts: list[Part] = []
        while True:
            if self._value is None:
                match = self._HEAD.match(self._held)
                if match is None:
                    return parts
                self._held = self._held[match.end() :]
                self._value = _JsonObject()
                parts.append(Part("call", "", self._num_calls, match[1]))
                self._num_calls += 1
            if not self._value.is_complete:
                count = self._value.push(self._held)
                if count:
                    parts.append(Part("call", self._held[:count], self._num_calls - 1))
                    self._held = self._held[count:]
                if not self._value.is_complete:
                    return parts
            tail = self._TAIL.match(self._held)
            if tail is None:
                return parts
            self._held = self._held[tail.end() :]
            self._value = None

    def flush(self) -> list[Part]:
        """See Reader."""
        return []


class _JsonObject:
    """Where an object ends, seen from its first bracket."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_complete = False

    def push(self, text: str) -> int:
        """How many characters of the text are of it."""
        for count, character in enumerate(text, 1):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_complete = True
                    return count
        return len(text)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
