"""The engine of one router: schedule, run, sample, answer. Knows neither where experts live nor who asked."""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model.causal_lm import CausalLM
from model.errors import ModelError
from model.experts import Experts
from model.kv_cache import PagedCache
from model.logprobs import RankedRow, RankedToken, rank_tokens
from model.sampling import AllowedTokens, Choice, sample
from router.constraint_compiler import GrammarCompiler
from router.constraint_matcher import MaskComputer, Matcher
from router.errors import BatchAtFault, DeadlineExceeded, InvalidRequest, NoTokenizer, RouterError
from router.forward import run_forwards
from router.histogram import REQUEST_BOUNDS_S, Histogram
from router.kv_blocks import default_num_pages
from router.micro_batches import MicroBatches
from router.request import Delta, Failure, FinishReason, PositionLogprobs, Request, TokenLogprob
from router.scheduler import Chunk, Scheduler
from router.sequence import Sequence
from router.step import PromptRows, Step, build_step

__all__ = ["Engine", "EngineConfig", "EngineLoad", "default_num_pages"]

logger = logging.getLogger("shoal")
PositiveInt = Annotated[int, Field(ge=1)]


class EngineConfig(BaseModel):
    """Sizes of one engine. At most max_batch_tokens sequences run, whatever max_running says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page_size: PositiveInt = Field(16, description="Tokens of one page.")
    num_pages: PositiveInt
    max_batch_tokens: PositiveInt = Field(2048, description="Tokens of one step, decodes and prefill chunks together.")
    max_running: PositiveInt = Field(128, description="Sequences that hold pages at once.")
    max_waiting: PositiveInt = Field(512, description="Past it `add` raises QueueFull.")
    prefill_chunk: PositiveInt = Field(512, description="Most prompt tokens of one sequence in one step.")
    max_model_len: PositiveInt = Field(description="Most tokens of prompt and answer together.")


@dataclass(frozen=True)
class EngineLoad:
    """How full the engine is now, and what it has done since it began."""

    num_running: int
    num_waiting: int
    kv_use: float  # 0 to 1
    num_steps: int
    num_split_steps: int  # in two micro-batches
    num_prefill_tokens: int
    num_generated_tokens: int
    num_preemptions: int

    def as_dict(self) -> dict[str, float]:
        """For reports and metrics."""
        return {name: float(value) for name, value in asdict(self).items()}


class Engine:
    """Sequences in, deltas out, one step at a time. One thread calls it; `load` may be read from any.

    A step that fails takes its own requests with it and nothing else. Of a step whose batch is itself at fault only the culprit
    fails: its requests are run again, one by one. Without `grammars` it takes no constrained requests.
    """

    def __init__(
        self,
        model: CausalLM,
        experts: Experts,
        config: EngineConfig,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.config = config
        self.grammars = grammars
        self._masks: MaskComputer | None = None
        self._model = model
        self._experts = experts
        self._device = device
        self._clock = clock
        self._vocab_size = model.config.vocab_size
        self._end_token_ids = tuple(token for token in model.config.eos_token_ids if 0 <= token < self._vocab_size)
        self._cache = PagedCache(model.cache_layout, config.num_pages, config.page_size, device)
        self._scheduler = Scheduler(
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            prefill_chunk=config.prefill_chunk,
        )
        self._sequences: dict[str, Sequence] = {}
        self._micro_batches = MicroBatches()
        self._num_steps = 0
        self._num_split_steps = 0
        self._num_prefill_tokens = 0
        self._num_generated_tokens = 0
        self.queue_time = Histogram(REQUEST_BOUNDS_S)  # seconds from `add` to the first step
        self._queued_at: dict[str, float] = {}  # of those that have had no step yet

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    @property
    def load(self) -> EngineLoad:
        """A snapshot; read beside a step, its numbers may be one step apart."""
        pages = self._scheduler.pages
        return EngineLoad(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_use=(pages.num_pages - pages.num_free) / pages.num_pages,
            num_steps=self._num_steps,
            num_split_steps=self._num_split_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self._scheduler.num_preemptions,
        )

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queues a request. InvalidRequest naming the field, or QueueFull; then nothing was taken in.

        A constrained request's `matcher` is made here where none is given, which takes as long as its grammar takes to compile.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"A request with the id {request.request_id!r} runs already: choose another.", field="request_id")
        _check_lengths(request, self.config.max_model_len)
        _check_tokens(request, self._vocab_size)
        deadline = None if request.deadline_s is None else self._clock() + request.deadline_s
        if request.sampling.constraint is not None and matcher is None:
            if self.grammars is None:
                raise NoTokenizer("constraint: this engine knows no tokenizer, so its answers cannot be held to a form.", "constraint")
            matcher = self.grammars.matcher(request)
        sequence = Sequence(request, self._end_token_ids, deadline, matcher)
        if sequence.sampling.bars_end and len(sequence.stop_token_ids) >= self._vocab_size:
            raise InvalidRequest("Every token of the vocabulary is a stop token, and min_tokens bars them all.", field="min_tokens")
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence
        self._queued_at[request.request_id] = self._clock()

    def cancel(self, request_id: str) -> None:
        """Frees the request's pages at once; no delta follows. An unknown or finished id is ignored."""
        sequence = self._sequences.pop(request_id, None)
        self._queued_at.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def step(self) -> list[Delta]:
        """Computes the next tokens. Never raises: what fails is told in the deltas of those it concerns."""
        late = DeadlineExceeded("The request's deadline passed before it finished.")
        deltas = [self._end(s, "cancelled", _failure(late)) for s in self._scheduler.expired(self._clock())]
        chunks = self._scheduler.schedule()
        if not chunks:
            return deltas
        self._num_steps += 1
        if self._queued_at:
            self._note_waits(chunks)
        sizes = sum(chunk.num_tokens for chunk in chunks), len(chunks)
        number = self._micro_batches.number_for(*sizes)
        try:
            with torch.inference_mode():
                started = time.perf_counter()
                step = build_step(chunks, self.config.page_size, self._device)
                batches = step.batch.split() if number == 2 else (step.batch,)
                with self._allowed(step) as allowed:
                    passes = [self._model.forward(batch, self._cache) for batch in batches]
                    logits, waited_s = run_forwards(passes, self._model, self._experts)
                    prompt_logprobs = [_rank_prompt(logits, rows) for rows in step.prompt_rows]
                    choices = self._sample(logits, step, allowed)
                self._micro_batches.observe(*sizes, number, time.perf_counter() - started, waited_s)
        except Exception as error:
            self._micro_batches.observe(*sizes, number, math.inf, 0.0)
            if isinstance(error, BatchAtFault) and len(chunks) > 1:
                logger.warning("%d requests are run one by one: %s", len(chunks), error)
                self._scheduler.isolate(chunks)
                return deltas
            if not isinstance(error, RouterError | ModelError):
                logger.exception("a step failed with its requests: %s", ", ".join(chunk.sequence.request_id for chunk in chunks))
            return deltas + [self._end(chunk.sequence, "error", _failure(error)) for chunk in chunks]
        # Nothing fails from here on: a step counts as a whole or not at all.
        self._num_split_steps += number == 2
        for rows, entries in zip(step.prompt_rows, prompt_logprobs, strict=True):
            rows.sequence.prompt_logprobs += entries
        self._scheduler.commit(chunks)
        self._num_prefill_tokens += sum(chunk.num_tokens for chunk in chunks if not chunk.is_decode)
        return deltas + [self._answer(sequence, choice) for sequence, choice in zip(step.sampled, choices, strict=True)]

    def _allowed(self, step: Step) -> AbstractContextManager["Future[AllowedTokens] | None"]:
        """What constrained sequences may choose from, computed beside the forward pass; None where there are none."""
        rows = [(row, s.matcher, s.sampling) for row, s in enumerate(step.sampled) if s.matcher is not None]
        if not rows:
            return nullcontext()
        self._masks = self._masks or MaskComputer(self._vocab_size)
        return self._masks.computing(rows)

    def _sample(self, logits: Tensor, step: Step, allowed: "Future[AllowedTokens] | None") -> list[Choice]:
        if not step.sampled:
            return []
        if len(step.sampled) < len(logits):
            logits = logits[torch.from_numpy(step.sample_rows).to(self._device)]
        return sample(logits, [sequence.sampling for sequence in step.sampled], None if allowed is None else allowed.result())

    def _answer(self, sequence: Sequence, choice: Choice) -> Delta:
        """The delta of one new token."""
        if sequence.matcher is not None and sequence.matcher.is_stuck:
            return self._end_stuck(sequence, sequence.matcher)
        if choice.token_id is None:
            self._clear(sequence)
            message = "The model's logits for this request are not finite numbers: its weights or its precision do not bear this input."
            logger.error("request %s: %s", sequence.request_id, message)
            return self._end(sequence, "error", Failure("internal", message))
        sequence.append(choice.token_id)
        self._num_generated_tokens += 1
        finish: FinishReason | None = None
        if choice.token_id in sequence.stop_token_ids or (sequence.matcher is not None and sequence.matcher.is_complete):
            finish = "stop"
        elif sequence.num_generated >= sequence.request.sampling.max_tokens:
            finish = "length"
        prompt_logprobs = None
        if sequence.owes_prompt_logprobs:
            sequence.owes_prompt_logprobs = False
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        logprobs = () if choice.ranked is None else (_position_logprobs(choice.ranked),)
        if finish is not None:
            self._forget(sequence)
        return Delta(sequence.request_id, (choice.token_id,), logprobs, prompt_logprobs, finish)

    def _end_stuck(self, sequence: Sequence, matcher: Matcher) -> Delta:
        """No token may come next: the answer ends if it may, though min_tokens or ignore_eos say otherwise, and fails if not."""
        if matcher.may_end:
            self._forget(sequence)
            return Delta(sequence.request_id, finish="stop")
        logger.warning("request %s: its constraint cannot be followed further", sequence.request_id)
        why = matcher.error or "no token of the vocabulary continues the answer"
        return self._end(sequence, "error", Failure("invalid_request", f"constraint: cannot be followed further: {why}", "constraint"))

    def _end(self, sequence: Sequence, finish: FinishReason, failure: Failure) -> Delta:
        self._forget(sequence)
        return Delta(sequence.request_id, finish=finish, failure=failure)

    def _note_waits(self, chunks: Many[Chunk]) -> None:
        now = self._clock()
        for chunk in chunks:
            if (since := self._queued_at.pop(chunk.sequence.request_id, None)) is not None:
                self.queue_time.observe(now - since)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._queued_at.pop(sequence.request_id, None)
        self._scheduler.remove(sequence)

    def _clear(self, sequence: Sequence) -> None:
        """Zeroes its pages: NaN left in them would reach whoever has them next through masked positions, as 0 x NaN."""
        pages = torch.from_numpy(sequence.pages).to(self._device)
        for entries in self._cache.layers:
            for stored in entries:
                stored.view(self.config.num_pages, self.config.page_size, *stored.shape[1:]).index_fill_(0, pages, 0)


def _check_lengths(request: Request, max_model_len: int) -> None:
    num_prompt, sampling = len(request.prompt_token_ids), request.sampling
    if num_prompt == 0:
        raise InvalidRequest("The prompt is empty: give at least one token.", field="prompt_token_ids")
    if num_prompt >= max_model_len:
        raise InvalidRequest(
            f"The prompt has {num_prompt} tokens, and with at least one to generate the model takes {max_model_len}: shorten it.",
            field="prompt_token_ids",
        )
    if num_prompt + sampling.max_tokens > max_model_len:
        raise InvalidRequest(
            f"The prompt's {num_prompt} tokens and max_tokens {sampling.max_tokens} are more than the model's {max_model_len}: "
            f"ask for at most {max_model_len - num_prompt}.",
            field="max_tokens",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}: lower it.", field="min_tokens"
        )
    if len(request.generated_token_ids) >= sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.generated_token_ids)} tokens are generated already and max_tokens is {sampling.max_tokens}: nothing is left.",
            field="generated_token_ids",
        )
    if request.deadline_s is not None and math.isnan(request.deadline_s):
        raise InvalidRequest("The deadline is not a number: give seconds.", field="deadline_s")


def _check_tokens(request: Request, vocab_size: int) -> None:
    sampling = request.sampling
    fields = {
        "prompt_token_ids": request.prompt_token_ids,
        "generated_token_ids": request.generated_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": tuple(sampling.logit_bias),
    }
    for field, token_ids in fields.items():
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidRequest(f"Token id {wrong} in {field} is outside of the vocabulary, 0 to {vocab_size - 1}.", field=field)


def _failure(error: Exception) -> Failure:
    if isinstance(error, RouterError | ModelError):
        return Failure(error.kind, str(error))
    return Failure("internal", "The router failed while it computed this request; its log says why, under the request's id.")


def _rank_prompt(logits: Tensor, rows: PromptRows) -> list[PositionLogprobs]:
    sequence = rows.sequence
    token_ids = torch.from_numpy(sequence.token_ids[rows.position : rows.position + rows.num_rows]).to(logits.device)
    num_top = sequence.request.sampling.prompt_logprobs or 0
    ranked = rank_tokens(logits[rows.first_row : rows.first_row + rows.num_rows], token_ids, num_top)
    return [_position_logprobs(row) for row in ranked]


def _position_logprobs(row: RankedRow) -> PositionLogprobs:
    return PositionLogprobs(_token_logprob(row.chosen), tuple(_token_logprob(token) for token in row.top))


def _token_logprob(token: RankedToken) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, token.rank)
