"""One request inside the engine: its tokens, how far they are computed, and the pages that hold them."""

from collections.abc import Iterable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from model.sampling import SamplingState
from router.constraint_matcher import Matcher
from router.request import PositionLogprobs, Request


class SequenceStatus(Enum):
    """Where a sequence stands; `WAITING` ones hold no pages."""

    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"


class Sequence:
    """Prompt and generated tokens in one array; the first `num_computed` of them are in the cache.

    The token at index i stands at position i, so recomputing after a preemption gives every token its old position.
    """

    def __init__(
        self,
        request: Request,
        end_token_ids: Iterable[int] = (),
        deadline: float | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.matcher = matcher
        self.request_id = request.request_id
        self.deadline = deadline
        self.status = SequenceStatus.WAITING
        self.num_prompt = len(request.prompt_token_ids)
        self.num_tokens = self.num_prompt + len(request.generated_token_ids)
        self.num_computed = 0
        self.prompt_logprobs: list[PositionLogprobs | None] = [None]
        self.owes_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self.stop_token_ids |= frozenset(end_token_ids)
        self.sampling = SamplingState(request.sampling, request.prompt_token_ids, request.generated_token_ids, self.stop_token_ids)
        self._token_ids = np.array(request.prompt_token_ids + request.generated_token_ids, dtype=np.int64)
        self._pages = np.empty(0, dtype=np.int64)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """All tokens known so far, [num_tokens]."""
        return self._token_ids[: self.num_tokens]

    @property
    def pages(self) -> NDArray[np.int64]:
        """Page of each run of page_size positions."""
        return self._pages

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that are not in the cache; 1 for a sequence that decodes."""
        return self.num_tokens - self.num_computed

    @property
    def max_stored_tokens(self) -> int:
        """The most tokens it can ever have in the cache: the last one generated is never computed."""
        return self.num_prompt + self.request.sampling.max_tokens - 1

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, those of an earlier router included."""
        return self.num_tokens - self.num_prompt

    def append(self, token_id: int) -> None:
        """Adds a generated token."""
        if self.num_tokens == len(self._token_ids):
            grown = np.empty(max(64, 2 * self.num_tokens), dtype=np.int64)
            grown[: self.num_tokens] = self._token_ids
            self._token_ids = grown
        self._token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        self.sampling.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def take_pages(self, pages: NDArray[np.int64]) -> None:
        """Adds pages behind those it has."""
        self._pages = np.concatenate((self._pages, pages))

    def give_pages(self) -> NDArray[np.int64]:
        """All its pages; nothing of it is in the cache afterwards."""
        pages, self._pages = self._pages, np.empty(0, dtype=np.int64)
        self.num_computed = 0
        return pages
