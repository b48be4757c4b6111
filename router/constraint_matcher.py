"""Which tokens may come next under a constraint: one matcher per sequence, and the masks of a whole step, computed beside it."""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import llguidance
import numpy as np
from numpy.typing import NDArray

from model.sampling import AllowedTokens, SamplingState

Words = NDArray[np.int32]

_MAX_THREADS = 8
_WORD = 32


class Matcher:
    """Follows one answer through its grammar. Token `may_end_id`, which no model has, stands in the masks for "the answer may end here".

    `end_token_ids` stop the sequence. Those that stand for no text (`special_ids`) are allowed where the answer may end and nowhere
    else; a stop token that is text is allowed wherever its text is, too.
    """

    def __init__(
        self, grammar: llguidance.LLMatcher, may_end_id: int, end_token_ids: Collection[int], special_ids: Collection[int], num_words: int
    ) -> None:
        self.grammar = grammar
        self.num_words = num_words
        self.may_end = False
        self.is_stuck = False
        self._may_end_id = may_end_id
        self._end_token_ids = frozenset(end_token_ids)
        self._ends = _places(self._end_token_ids)
        self._special_ends = _places(self._end_token_ids & frozenset(special_ids))

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self.grammar.is_stopped()) and not self.error

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; empty while it can."""
        return str(self.grammar.get_error())

    def accept(self, token_id: int) -> None:
        """The answer has grown by an allowed token; one that ends it is no part of the text."""
        if token_id not in self._end_token_ids or not self.may_end:
            self.grammar.consume_token(token_id)

    def finish_mask(self, words: Words, sampling: SamplingState, vocab_size: int) -> None:
        """Turns the grammar's own mask, words [num_words], into that of the next token: end tokens, and nothing past the vocabulary."""
        self.may_end = bool(words[self._may_end_id // _WORD] >> (self._may_end_id % _WORD) & 1) and not self.error
        last, rest = divmod(vocab_size, _WORD)
        words[last + (rest > 0) :] = 0
        if rest:
            words[last] &= (1 << rest) - 1
        if self.may_end and not sampling.bars_end:
            np.bitwise_or.at(words, *self._ends)
        else:
            index, bits = self._ends if sampling.bars_end else self._special_ends
            np.bitwise_and.at(words, index, ~bits)
        self.is_stuck = bool(self.error) or not words.any()


class MaskComputer:
    """Computes the masks of a step's constrained sequences, in threads of its own that hold no interpreter lock."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._executor = llguidance.LLExecutor(num_threads=max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")

    @contextmanager
    def computing(self, rows: Sequence[tuple[int, Matcher, SamplingState]]) -> Iterator["Future[AllowedTokens]"]:
        """The masks of `rows` (row of the logits, whose matcher, whose state) in the making, from now to the block's end.

        However the block ends, no matcher is in use any more.
        """
        future = self._thread.submit(self._compute, rows)
        try:
            yield future
        finally:
            future.exception()

    def _compute(self, rows: Sequence[tuple[int, Matcher, SamplingState]]) -> AllowedTokens:
        words = np.zeros((len(rows), rows[0][1].num_words), dtype=np.int32)
        grammars = [(matcher.grammar, place) for place, (_, matcher, _) in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(grammars, words.ctypes.data, words.strides[0], len(rows))
        for place, (_, matcher, sampling) in enumerate(rows):
            matcher.finish_mask(words[place], sampling, self._vocab_size)
            if matcher.is_stuck:
                words[place] = -1  # the row is not looked at, and must not look unsound
        return AllowedTokens(np.array([row for row, _, _ in rows], dtype=np.int64), words)


def _places(token_ids: Collection[int]) -> tuple[NDArray[np.int64], Words]:
    """Where the bits of tokens are: words and masks, one each."""
    ids = np.array(sorted(token_ids), dtype=np.int64)
    return ids // _WORD, (np.uint32(1) << (ids % _WORD).astype(np.uint32)).view(np.int32)
