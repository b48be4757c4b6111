"""Continuous batching: which tokens of which sequences the next step computes. Decides only; knows no model and no clock.

Order of arrival rules everything. `running` is older than `waiting`, both are in order of arrival, and every decision keeps
it so: sequences are admitted from the front of `waiting` and never overtaken, and the youngest running one gives way when
pages run out, back to the front of `waiting`. The oldest running sequence can therefore always go on, so all of them finish.

Only who is isolated, since a step that it was part of brought down whatever computed it, has the steps to itself until it is known
to be innocent.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from router.errors import InvalidRequest, QueueFull
from router.kv_blocks import PageAllocator, pages_for
from router.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of a sequence from position `start`; `is_last` if they are all it has, so that one is sampled."""

    sequence: Sequence
    start: int
    num_tokens: int
    is_last: bool

    @property
    def end(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is the one token that was generated last."""
        return self.is_last and self.num_tokens == 1 and self.start >= self.sequence.num_prompt


class Scheduler:
    """The two queues and the pages. No more sequences run than a step has tokens, so that each gets one in every step."""

    def __init__(
        self, *, num_pages: int, page_size: int, max_batch_tokens: int, max_running: int, max_waiting: int, prefill_chunk: int
    ) -> None:
        self.page_size = page_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)
        self.max_waiting = max_waiting
        self.prefill_chunk = prefill_chunk
        self.pages = PageAllocator(num_pages)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._isolated: dict[Sequence, int] = {}

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue. InvalidRequest if it could never fit, QueueFull."""
        capacity = self.pages.num_pages * self.page_size
        if sequence.max_stored_tokens > capacity:
            field = "prompt_token_ids" if sequence.num_prompt > capacity else "max_tokens"
            raise InvalidRequest(
                f"The prompt's {sequence.num_prompt} tokens and max_tokens {sequence.request.sampling.max_tokens} need room for "
                f"{sequence.max_stored_tokens} tokens, and the whole cache of this router holds {capacity}: shorten one of them.",
                field=field,
            )
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already, the limit of this router: try again in a moment.")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a finished, failed or cancelled sequence and frees its pages. A second time is harmless."""
        if sequence.status is SequenceStatus.GONE:
            return
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(sequence)
        self._isolated.pop(sequence, None)
        sequence.status = SequenceStatus.GONE
        self.pages.release(sequence.give_pages())

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline is not after `now`, oldest first."""
        return [s for queue in (self.running, self.waiting) for s in queue if s.deadline is not None and s.deadline <= now]

    def schedule(self) -> tuple[Chunk, ...]:
        """The next step: a token of every sequence that decodes, then prefill chunks, oldest first. The isolated go before, alone."""
        if self._isolated and (alone := self._chunk_alone()) is not None:
            return (alone,)
        num_preemptions = self.num_preemptions
        decodes = [self._chunk(s, 1) for s in tuple(self.running) if s.num_uncomputed == 1 and self._grow(s)]
        budget = self.max_batch_tokens - len(decodes)
        prefills: list[Chunk] = []
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and budget > 0:
                prefills.append(self._chunk(sequence, budget))
                budget -= prefills[-1].num_tokens
        # Not in a step that took pages away: what was preempted would come straight back and be preempted again.
        while budget > 0 and num_preemptions == self.num_preemptions and not self._must_wait_alone and self._admit():
            prefills.append(self._chunk(self.running[-1], budget))
            budget -= prefills[-1].num_tokens
        return (*decodes, *prefills)

    def commit(self, chunks: Many[Chunk]) -> None:
        """The chunks are computed: their tokens are in the cache."""
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            if self._isolated and self._isolated.get(chunk.sequence, chunk.end) <= chunk.end:
                self._isolated.pop(chunk.sequence, None)

    def isolate(self, chunks: Many[Chunk]) -> None:
        """One of the chunks is not to be computed with others again: each sequence is alone in its steps until its chunk is computed."""
        self._isolated.update((chunk.sequence, chunk.end) for chunk in chunks)

    @property
    def _must_wait_alone(self) -> bool:
        """Whether who is next to be admitted is isolated, and not to join others."""
        return bool(self._isolated) and bool(self.waiting) and self.waiting[0] in self._isolated

    def _chunk_alone(self) -> Chunk | None:
        """The next tokens of the oldest isolated sequence; None where none has its pages now."""
        if self._must_wait_alone:
            self._admit()
        for sequence in tuple(self.running):
            if sequence in self._isolated and (sequence.num_uncomputed > 1 or self._grow(sequence)):
                return self._chunk(sequence, self.max_batch_tokens)
        return None

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        num_tokens = min(sequence.num_uncomputed, self.prefill_chunk, budget)
        return Chunk(sequence, sequence.num_computed, num_tokens, is_last=num_tokens == sequence.num_uncomputed)

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for the sequence's next token; the youngest give way, the sequence itself at last (then False)."""
        if sequence.status is not SequenceStatus.RUNNING:
            return False
        missing = pages_for(sequence.num_tokens, self.page_size) - len(sequence.pages)
        if missing <= 0:
            return True
        while (pages := self.pages.allocate(missing)) is None:
            youngest = self.running.pop()
            self.num_preemptions += 1
            self.pages.release(youngest.give_pages())
            youngest.status = SequenceStatus.WAITING
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        sequence.take_pages(pages)
        return True

    def _admit(self) -> bool:
        """Lets the oldest waiting sequence run, with pages for all its known tokens; False if it must wait on."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        sequence = self.waiting[0]
        needed = pages_for(sequence.num_tokens, self.page_size)
        # A page in reserve for each that runs, so that the newcomer is not preempted as soon as they grow.
        if needed + len(self.running) > self.pages.num_free and self.running:
            return False
        pages = self.pages.allocate(needed)
        assert pages is not None, "a sequence that fits the empty cache was let in"
        self.waiting.popleft()
        sequence.take_pages(pages)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        return True
