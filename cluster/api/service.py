"""The text service behind both protocols: checks a call, sends it to the routers, gives back text."""

import asyncio
import itertools
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from cluster.api.answer import Answer, Token
from cluster.api.chat_prompt import ChatPrompt, chat_prompt
from cluster.api.errors import ModelNotFound, RequestRefused, TextNotSupported
from cluster.api.fan import Fan, Generator
from cluster.api.stream_pace import StreamPace
from cluster.api.trace_context import TraceContext
from cluster.guard.guard import ANONYMOUS, Grant, current_grant
from cluster.metrics.watch import Watch
from model.errors import ChatTemplateMissing, TokenizerError
from model.tokenizer import Tokenizer
from router.constraint import check_constraint
from router.errors import DeadlineExceeded, InvalidRequest
from router.request import Delta, Failure, FinishReason, PositionLogprobs, Request, SamplingParams

COMPLETION_TOKENS = 16
INT64 = 2**63


@dataclass(frozen=True)
class Limits:
    """What one call may ask of the gateway."""

    default_deadline_s: float = 600.0
    max_deadline_s: float = 3600.0
    max_sequences: int = 128  # prompts x n
    max_stops: int = 64
    max_prompt_bytes: int = 1 << 21  # text of a call's prompts: tokenizing takes one thread, in turn
    max_prompt_tokens: int | None = None  # of one prompt; None: what the model takes


@dataclass(frozen=True)
class Call:
    """What a client wants. `sampling` has the parameters it gave, by SamplingParams' names; `names` says what its protocol
    calls a field, where that differs, so that an error speaks of what the client wrote.
    """

    request_id: str
    model: str | None = None  # None: the one that is served
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] | None = None  # instead of prompts, in the form that chat templates read
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    n: int = 1
    deadline_s: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    trace: TraceContext | None = None  # the client's, from its traceparent
    tools: tuple[Mapping[str, Any], ...] = ()  # functions that may be called, in OpenAI's form; with messages
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # for the chat template

    def name(self, field_name: str) -> str:
        """The protocol's word for a field."""
        return self.names.get(field_name, field_name)

    def invalid(self, field_name: str, message: str) -> InvalidRequest:
        """The error that names the field as the client wrote it."""
        name = self.name(field_name)
        return InvalidRequest(f"{name}: {message}", field=name)


@dataclass(frozen=True)
class Plan:
    """A call that may run: request p x n + i is answer i to prompt p."""

    call: Call
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    stop_token_ids: frozenset[int]
    arrived: float  # loop time
    deadline: float  # loop time
    opens_thinking: bool = False  # the answer begins with reasoning, the prompt having said <think>
    grant: Grant = ANONYMOUS


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted; those of an end token or a stop string count."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the call arrived."""

    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new in answer `index`. `usage` and `timing` come with `finish`."""

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None


class TextService:
    """One model, spoken to in text. `end_token_ids` are the model's end tokens: they are no part of an answer's text.

    Without a tokenizer, prompts are token ids and answers have no text.
    """

    def __init__(
        self,
        model_id: str,
        generator: Generator,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        end_token_ids: Collection[int] = (),
        limits: Limits | None = None,
        watch: Watch | None = None,
        pace: StreamPace | None = None,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.created = int(time.time())
        self.pace = pace or StreamPace()
        self._generator = generator
        self._end_token_ids = frozenset(end_token_ids)
        self.limits = limits or Limits()
        self._watch = watch or Watch()
        # A long prompt takes long to tokenize: not on the event loop, and one at a time.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def check_model(self, model: str | None, name: str = "model") -> None:
        """Raises ModelNotFound unless it is the one that is served; None is."""
        if model is not None and model != self.model_id:
            raise ModelNotFound(f"There is no model {model[:100]!r} here: the model that is served is {self.model_id!r}.", name)

    async def encode(self, text: str, add_special_tokens: bool = True, field_name: str = "prompt") -> tuple[int, ...]:
        """Token ids. InvalidRequest naming the field, or TextNotSupported."""
        tokenizer = self._text_tokenizer(field_name)
        self._check_text(field_name, text)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, tokenizer.encode, text, add_special_tokens)
        except TokenizerError as error:
            raise InvalidRequest(f"{field_name}: {error}", field=field_name) from error

    async def encode_chat(self, call: Call) -> tuple[int, ...]:
        """The prompt of a call's messages. InvalidRequest, ChatTemplateMissing or TextNotSupported."""
        return (await self._chat_prompt(call, call.messages or (), is_constrained=False)).token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of checked token ids; TextNotSupported."""
        return self._text_tokenizer("token_ids").decode(token_ids, skip_special_tokens)

    async def plan(self, call: Call) -> Plan:
        """Checks the call in full. Raises InvalidRequest naming the field, ModelNotFound, ChatTemplateMissing or TextNotSupported."""
        try:
            return await self._plan(call)
        except Exception as error:
            self._watch.refused(error)
            raise

    async def _plan(self, call: Call) -> Plan:
        arrived = asyncio.get_running_loop().time()
        self.check_model(call.model, call.name("model"))
        deadline_s = self._deadline_s(call)
        sampling = _sampling(call)
        self._check_counts(call)
        if sampling.constraint is not None:
            check_constraint(sampling.constraint, self.tokenizer, call.name("constraint"))
        prompts, opens_thinking = await self._prompts(call, is_constrained=sampling.constraint is not None)
        for token_ids in prompts:
            self._check_prompt(call, token_ids)
        self.check_token_ids(sampling.stop_token_ids, call.name("stop_token_ids"))
        self.check_token_ids(sampling.logit_bias, call.name("logit_bias"))
        seed = sampling.seed if call.sampling.get("seed") is not None else secrets.randbelow(INT64)
        requests = tuple(
            Request(
                request_id=uuid.uuid4().hex,  # never the client's: it may send one id twice
                prompt_token_ids=token_ids,
                sampling=sampling.model_copy(
                    update={"seed": (seed + i + INT64) % (2 * INT64) - INT64, "max_tokens": self._max_tokens(call, sampling, token_ids)}
                ),
                deadline_s=deadline_s,
            )
            for token_ids, i in itertools.product(prompts, range(call.n))
        )
        end_token_ids = frozenset() if sampling.ignore_eos else self._end_token_ids
        stop_token_ids, deadline = end_token_ids | set(sampling.stop_token_ids), arrived + deadline_s
        return Plan(call, prompts, requests, stop_token_ids, arrived, deadline, opens_thinking, current_grant())

    async def run(self, plan: Plan, *, is_paced: bool = False) -> AsyncGenerator[list[TextDelta], None]:
        """Text of all answers as it comes: each time all that is ready, one delta at least. Closing it stops them.

        `is_paced`: it goes straight to a client, and rests as StreamPace says. Raises what the table in `errors` has a row for.
        """
        loop = asyncio.get_running_loop()
        answers = [Answer(self.tokenizer, r.prompt_token_ids, plan.call.stop, plan.stop_token_ids) for r in plan.requests]
        left = len(answers)
        try:
            stream = await plan.grant.open_stream(sum(map(len, plan.prompts)))
        except Exception as error:
            self._watch.refused(error)
            raise
        watched = self._watch.begin(plan)
        fan = Fan(self._generator, watched.requests)
        stream.on_revoked = fan.fail
        too_late = DeadlineExceeded("The deadline passed before the answer was complete.")
        timer = loop.call_at(plan.deadline, fan.fail, too_late)
        written = self.pace.open()
        try:
            while left:
                arrivals, pieces, refusal = await fan.next(), [], None
                for index, delta, now in arrivals:
                    answer = answers[index]
                    if answer.finish is not None:
                        continue  # a stop string ended it
                    refusal = _refusal(delta, plan.call)
                    if refusal is not None:
                        break
                    stream.count(len(delta.token_ids))
                    if delta.token_ids:
                        watched.tokens(index, len(delta.token_ids), now)
                    piece = answer.push(delta)
                    usage = timing = None
                    if piece.finish is not None:
                        left -= 1
                        fan.stop(index)
                        usage = Usage(len(plan.requests[index].prompt_token_ids), answer.num_tokens)
                        timing = Timing(watched.first_token_at.get(index, now) - plan.arrived, now - plan.arrived)
                        watched.ended(index, piece.finish, now)
                    pieces.append(TextDelta(index, piece.text, piece.tokens, delta.prompt_logprobs, piece.finish, usage, timing))
                if pieces:
                    yield pieces
                if refusal is not None:
                    raise refusal
                if is_paced and left and any(delta.token_ids for _, delta, _ in arrivals):
                    await written.rest()
        except Exception as error:
            watched.failed(error)
            raise
        finally:
            timer.cancel()
            written.end()
            stream.end()
            watched.close(loop.time())
            await fan.close()

    def check_token_ids(self, token_ids: Collection[int], name: str) -> None:
        """InvalidRequest unless all are of the model's vocabulary."""
        wrong = next((token for token in token_ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(f"{name}: token id {wrong} is outside of the vocabulary, 0 to {self.vocab_size - 1}.", field=name)

    def _text_tokenizer(self, field_name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise TextNotSupported(f"{field_name}: the checkpoint has no tokenizer; send token ids.", field_name)
        return self.tokenizer

    def _deadline_s(self, call: Call) -> float:
        if call.deadline_s is None:
            return self.limits.default_deadline_s
        if not 0 < call.deadline_s < float("inf"):
            raise call.invalid("deadline_s", "must be a number of seconds above 0.")
        return min(call.deadline_s, self.limits.max_deadline_s)

    def _check_counts(self, call: Call) -> None:
        if call.n < 1:
            raise call.invalid("n", "must be at least 1.")
        if call.messages is None and not call.prompts:
            raise call.invalid("prompt", "must not be empty.")
        sequences = call.n * max(1, len(call.prompts))
        if sequences > self.limits.max_sequences:
            raise call.invalid("n", f"asks for {sequences} answers with all prompts; at most {self.limits.max_sequences} go in one call.")
        if len(call.stop) > self.limits.max_stops:
            raise call.invalid("stop", f"has {len(call.stop)} strings; at most {self.limits.max_stops} are allowed.")
        if any(not stop for stop in call.stop):
            raise call.invalid("stop", "must not have an empty string.")
        if call.stop and self.tokenizer is None:
            raise TextNotSupported(f"{call.name('stop')}: the checkpoint has no tokenizer; use stop_token_ids.", call.name("stop"))

    async def _prompts(self, call: Call, *, is_constrained: bool) -> tuple[tuple[tuple[int, ...], ...], bool]:
        if call.messages is not None:
            prompt = await self._chat_prompt(call, call.messages, is_constrained=is_constrained)
            return (prompt.token_ids,), prompt.opens_thinking
        name = call.name("prompt")
        self._check_text(name, call.prompts)
        return tuple([await self.encode(p, field_name=name) if isinstance(p, str) else p for p in call.prompts]), False

    async def _chat_prompt(self, call: Call, messages: Sequence[Mapping[str, Any]], *, is_constrained: bool) -> ChatPrompt:
        if not messages:
            raise call.invalid("messages", "must not be empty.")
        tokenizer = self._text_tokenizer(call.name("messages"))
        self._check_text(call.name("messages"), (messages, call.tools))
        render = partial(chat_prompt, tokenizer, messages, call.tools, call.template_variables, is_constrained=is_constrained)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, render)
        except ChatTemplateMissing:
            raise
        except TokenizerError as error:
            raise call.invalid("messages", str(error)) from error

    def _check_text(self, name: str, value: Any) -> None:
        num_bytes, most = _text_bytes(value), self.limits.max_prompt_bytes
        if num_bytes > most:
            raise InvalidRequest(f"{name}: has {num_bytes} bytes of text; at most {most} go in one call.", field=name)

    def _check_prompt(self, call: Call, token_ids: tuple[int, ...]) -> None:
        name = "prompt" if call.messages is None else "messages"
        longest = self.limits.max_prompt_tokens
        if longest is not None and len(token_ids) > longest:
            raise call.invalid(name, f"has {len(token_ids)} tokens; a prompt may have {longest} here.")
        if not token_ids:
            raise call.invalid(name, "must not be empty.")
        self.check_token_ids(token_ids, call.name(name))
        if len(token_ids) >= self.max_model_len:
            raise call.invalid(
                name, f"has {len(token_ids)} tokens; with at least one to generate, the model takes {self.max_model_len} together."
            )

    def _max_tokens(self, call: Call, sampling: SamplingParams, token_ids: tuple[int, ...]) -> int:
        room = self.max_model_len - len(token_ids)
        if call.sampling.get("max_tokens") is None:
            wanted = room if call.messages is not None else min(room, max(COMPLETION_TOKENS, sampling.min_tokens))
        else:
            wanted = sampling.max_tokens
        if wanted > room:
            raise call.invalid(
                "max_tokens",
                f"{wanted} and the prompt's {len(token_ids)} tokens are over the model's {self.max_model_len}; ask for at most {room}.",
            )
        if sampling.min_tokens > wanted:
            raise call.invalid("min_tokens", f"{sampling.min_tokens} is more than max_tokens, {wanted}.")
        return wanted


def _sampling(call: Call) -> SamplingParams:
    """The parameters given, checked; InvalidRequest naming the first that is wrong."""
    try:
        return SamplingParams.model_validate({name: value for name, value in call.sampling.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise call.invalid(str(first["loc"][0]), f"{first['msg']}.") from error


def _text_bytes(value: Any) -> int:
    """Of all text in it, in UTF-8."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(key) + _text_bytes(item) for key, item in value.items())
    return sum(map(_text_bytes, value)) if isinstance(value, list | tuple) else 0


def _refusal(delta: Delta, call: Call) -> RequestRefused | None:
    """A failed delta ends the whole call by this."""
    if delta.failure is None and delta.finish not in ("error", "cancelled"):
        return None
    failure = delta.failure or Failure(str(delta.finish), "The request ended before its answer was complete.")
    if failure.field is not None:
        failure = Failure(failure.kind, failure.message, call.name(failure.field))
    return RequestRefused(failure)
