"""The token batch of one step, and the two messages by which a forward pass asks for its routed experts."""

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens of S sequences laid end to end: T tokens, R of them wanted as logits, P pages in the longest block table.

    Lengths are host integers, so that no forward pass copies from the device; sequences may be decodes (one query token)
    or prefill chunks, in any order. `context_lens` counts the tokens in the cache after this step, the step's own
    included. `rope_lengths` is the sequence length that RoPE kind `dynamic` scales by: for a prompt token the prompt's
    length, for a generated token its position + 1.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, cache slot of each token: page * page_size + offset
    block_tables: Tensor  # [S, P] int64, padded with 0
    query_lens: tuple[int, ...]  # S
    context_lens: tuple[int, ...]  # S
    logit_rows: Tensor  # [R] int64, indices into T
    rope_lengths: Tensor  # [T] int64

    def split(self) -> tuple["Batch", "Batch"]:
        """The first sequences and the others, which must be two or more: where the two are nearest in tokens. Their logits follow on."""
        ends = list(itertools.accumulate(self.query_lens))
        last = min(range(1, len(ends)), key=lambda place: abs(2 * ends[place - 1] - ends[-1]))
        return self._part(0, last), self._part(last, len(ends))

    def _part(self, first: int, last: int) -> "Batch":
        start, end = sum(self.query_lens[:first]), sum(self.query_lens[:last])
        is_mine = (self.logit_rows >= start) & (self.logit_rows < end)
        return Batch(
            token_ids=self.token_ids[start:end],
            positions=self.positions[start:end],
            slots=self.slots[start:end],
            block_tables=self.block_tables[first:last],
            query_lens=self.query_lens[first:last],
            context_lens=self.context_lens[first:last],
            logit_rows=self.logit_rows[is_mine] - start,
            rope_lengths=self.rope_lengths[start:end],
        )


@dataclass(frozen=True)
class Dispatch:
    """Asks for the routed experts of `layer` for hidden [T, H]; the driver gates, sends and answers with a handle."""

    layer: int
    hidden: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class Combine:
    """Asks for the answer to `handle`: the weighted sum of the chosen experts' outputs, [T, H] in hidden's dtype."""

    handle: object


# Yields Dispatch (is sent a handle) and Combine (is sent a tensor); returns logits [R, V] in float32.
ForwardPass: TypeAlias = Generator[Dispatch | Combine, object, Tensor]
