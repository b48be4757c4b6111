"""One answer in the making: deltas of token ids in, pieces of text out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from model.tokenizer import IncrementalDecoder, StopStrings, Tokenizer
from router.request import Delta, FinishReason, PositionLogprobs


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token whose text is out. `start` and `end` count characters of the answer before and after it."""

    token_id: int
    logprobs: PositionLogprobs | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta adds: text that cannot be the beginning of a stop string, and the tokens it came from."""

    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None


class Answer:
    """Decodes one sequence, cuts it at the first stop string, and keeps tokens back until their text is out.

    `stop_token_ids` are the tokens that end an answer without being part of its text. Without a tokenizer the text is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], stops: Sequence[str], stop_token_ids: Collection[int]
    ) -> None:
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, prompt_token_ids)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids
        self._held: list[Token] = []
        self._decoded = 0  # characters
        self._sent = 0
        self.num_tokens = 0
        self.finish: FinishReason | None = None  # once it is over

    def push(self, delta: Delta) -> Piece:
        """The piece that this delta completes; its finish is "stop" once a stop string is complete, whatever the delta's."""
        text = ""
        last = len(delta.token_ids) - 1
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            ends = position == last and delta.finish == "stop" and token_id in self._stop_token_ids
            new = "" if ends or self._decoder is None else self._decoder.push(token_id)
            logprobs = delta.logprobs[position] if delta.logprobs else None
            self._held.append(Token(token_id, logprobs, self._decoded, self._decoded + len(new)))
            text += self._let_through(new)
            if self._stops.stopped:
                break
        finish = delta.finish
        if finish is not None and not self._stops.stopped:
            text += self._let_through("" if self._decoder is None else self._decoder.flush())
            rest = self._stops.flush()
            self._sent += len(rest)
            text += rest
        if self._stops.stopped:
            finish = "stop"
        self.finish = finish
        return Piece(text, self._release(finish), finish)

    def _let_through(self, new: str) -> str:
        self._decoded += len(new)
        out = self._stops.push(new)
        self._sent += len(out)
        return out

    def _release(self, finish: FinishReason | None) -> tuple[Token, ...]:
        """Tokens go out with their text, never before: their strings would tell a stop string that the text keeps back."""
        if self._stops.stopped:
            out = tuple(token for token in self._held if token.start < self._sent)
            self._held = []
            return out
        pending = self._stops.held or (self._decoder is not None and self._decoder.has_pending)
        if finish is not None or not pending:
            out = tuple(self._held)
            self._held = []
            return out
        count = 0
        while count < len(self._held) and self._held[count].start < self._sent and self._held[count].end <= self._sent:
            count += 1
        out = tuple(self._held[:count])
        self._held = self._held[count:]
        return out
