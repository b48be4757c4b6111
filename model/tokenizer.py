"""Text to token ids and back: a checkpoint's tokenizer and chat template, whole-character streaming, stop strings."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.errors import ChatTemplateMissing, TokenizerError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TESTS_FOR_NONE = re.compile(r"""\bcontent\b['"]?\]?\s+is\s+(?:not\s+)?none""")
REPLACEMENT = "\ufffd"
EMPTY: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe: it only reads the Rust tokenizer behind transformers' wrapper.

    Raises TokenizerError if the directory holds no tokenizer, or one that the installed packages cannot read.
    """

    def __init__(self, directory: Path) -> None:
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise TokenizerError(f"{directory} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there.")
        try:
            from transformers import AutoTokenizer  # seconds to import: only where text is handled

            wrapper = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            backend = wrapper.backend_tokenizer
        except Exception as error:
            raise TokenizerError(f"The tokenizer in {directory} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        self._wrapper: Any = wrapper
        self._backend: Any = backend
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; a model's own vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def as_json(self) -> str:
        """The whole tokenizer in the form of a tokenizer.json."""
        return str(self._backend.to_str())

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can work."""
        return bool(self._wrapper.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; TokenizerError if it is not valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"The text is not valid Unicode: character {error.start} is a lone surrogate.") from error
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    @cached_property
    def chat_template(self) -> str:
        """The template's text, of several all; empty without one."""
        template = self._wrapper.chat_template
        return "".join(template.values()) if isinstance(template, dict) else template or ""

    @cached_property
    def template_takes_tools(self) -> bool:
        """Whether the template does anything with the tools that it is given."""
        return re.search(r"\btools\b", self.chat_template) is not None

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation with the assistant's turn opened. Raises what `chat_text` raises."""
        # The template writes its own begin token: adding special tokens again would double it.
        return self.encode(self.chat_text(messages), add_special_tokens=False)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), variables: Mapping[str, Any] = EMPTY
    ) -> str:
        """A conversation with the assistant's turn opened. `variables` are the template's own, such as `thinking`.

        Arguments of tool calls are objects; a template that wants them as text (DeepSeek-V3's) gets text.
        Raises ChatTemplateMissing, or TokenizerError with the template's own words where it refuses the messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateMissing("The checkpoint has no chat template: use completions with the prompt written out.")
        try:
            try:
                return self._render(messages, tools, variables)
            except TypeError:
                return self._render([_with_arguments_as_text(message) for message in messages], tools, variables)
        except Exception as error:
            raise TokenizerError(f"The chat template refuses these messages: {error}") from error

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        given = [dict(tool) for tool in tools] or None
        if TESTS_FOR_NONE.search(self.chat_template) and any(message.get("content", "") is None for message in messages):
            return self._render_as_it_is(messages, given, variables)
        return str(
            self._wrapper.apply_chat_template(
                [dict(message) for message in messages], tools=given, tokenize=False, add_generation_prompt=True, **variables
            )
        )

    def _render_as_it_is(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> str:
        """Transformers leaves out what is None, by which DeepSeek's templates tell a turn that only called tools."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._wrapper.get_chat_template(None, tools)
        known = {**self._wrapper.special_tokens_map, **variables}
        conversations = [[dict(message) for message in messages]]
        texts, _ = render_jinja_template(conversations, tools, chat_template=template, add_generation_prompt=True, **known)
        return str(texts[0])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters; empty for an unknown id."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added_token_ids:
            return str(piece).encode()
        if self._is_byte_level:
            return bytes(BYTE_OF_CHARACTER[c] for c in piece) if all(c in BYTE_OF_CHARACTER for c in piece) else str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    @cached_property
    def _added_token_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self._backend.decoder
        if decoder is None:
            return False
        state = json.loads(decoder.__getstate__())
        return any(part.get("type") == "ByteLevel" for part in (state, *state.get("decoders", ())))


def _with_arguments_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where printable, else the next free from U+0100 (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class IncrementalDecoder:
    """Token ids in, complete characters out: the pieces joined equal the decoding of all tokens behind the prompt.

    A window of tokens is decoded twice, without and with the newest; the difference is new text, given out once it does
    not end inside a character. The window reaches back over tokens already given out, since many decoders treat the
    first token apart (a leading space goes); at the start it reaches into the prompt.
    """

    PROMPT_TOKENS = 6  # of context; a character has at most four bytes
    MAX_PENDING = 24  # bounds the work on tokens that are no text at all

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = [t for t in prompt_token_ids[-4 * self.PROMPT_TOKENS :] if t not in tokenizer.special_token_ids]
        self._window: list[int] = []
        self._given_text = ""
        # A tail may begin inside a character, then a shorter one does not. If every tail ends in U+FFFD the prompt ends
        # inside a character, whose rest cannot be told apart from text of our own: then without the prompt.
        for length in range(min(len(tail), self.PROMPT_TOKENS), 0, -1):
            text = tokenizer.decode(tail[-length:])
            if not text.endswith(REPLACEMENT):
                self._window, self._given_text = tail[-length:], text
                break
        self._given = len(self._window)  # tokens of the window whose text is out

    @property
    def has_pending(self) -> bool:
        """Whether tokens wait for the rest of a character."""
        return len(self._window) > self._given

    def push(self, token_id: int) -> str:
        """Text that this token completes, possibly empty."""
        if token_id in self._tokenizer.special_token_ids:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if len(text) > len(self._given_text) and not text.endswith(REPLACEMENT):
            return self._advance(len(self._window), text)
        if len(self._window) - self._given > self.MAX_PENDING:
            return self._give_garbage(text)
        return ""

    def flush(self) -> str:
        """The rest at the end of a sequence, a cut character as U+FFFD."""
        return self._advance(len(self._window), self._tokenizer.decode(self._window))

    def _advance(self, end: int, text: str) -> str:
        """Gives out the text of the window's first `end` tokens; what was given out before leaves the window."""
        new = text[len(self._given_text) :]
        if end > self._given:
            self._window = self._window[self._given :]
            self._given = end - self._given
            self._given_text = self._tokenizer.decode(self._window[: self._given])
        return new

    def _give_garbage(self, text: str) -> str:
        """Bytes that will never be a character: gives out all but a tail that may still become one."""
        for held in range(1, 9):
            end = len(self._window) - held
            left = self._tokenizer.decode(self._window[:end])
            # Only at a boundary between characters do the two parts decode to the whole.
            if left + self._tokenizer.decode(self._window[end:]) == text:
                return self._advance(end, left)
        return self._advance(len(self._window), text)


class StopStrings:
    """Lets text through up to the stop string that is complete first (of several, the longest); holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    @property
    def held(self) -> str:
        """Text not let through yet."""
        return self._held

    def push(self, text: str) -> str:
        """The text that may go out. After a stop string (`stopped` is then true) nothing more does."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stops if stop in held]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            suffix = held[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                self._held = suffix
                return held[:-length]
        self._held = ""
        return held

    def flush(self) -> str:
        """What is held at the end of a sequence: it was the beginning of a stop string, and no more."""
        held, self._held = self._held, ""
        return "" if self.stopped else held
