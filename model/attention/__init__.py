"""Attention over the paged cache: what to read and what to see, planned once a step for all layers.

Sequences with one query token (decodes, and prefill chunks of one) are attended to as one padded batch; longer chunks one by one.
Plain and absorbed forms, and grouped queries, are `mla` and `gqa`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch


@dataclass(frozen=True)
class Span:
    """Which keys a group of sequences reads from the cache: `length` slots from the start of tables [S, P]."""

    tables: Tensor
    length: int


@dataclass(frozen=True)
class DecodeGroup:
    """D sequences of one query token. `rows` [D] are their rows among T, None where the batch has no others.

    Of its table each sees the keys from `first` [D] up to `last` [D]; `mask` [D, length] is True there, None where all are seen.
    """

    rows: Tensor | None
    span: Span
    mask: Tensor | None
    first: Tensor
    last: Tensor

    @classmethod
    def of_tables(cls, tables: Tensor, first: Tensor, last: Tensor) -> "DecodeGroup":
        """Sequences that are all of the batch and see different numbers of keys; no mask."""
        return cls(None, Span(tables, int(last.max())), None, first, last)


@dataclass(frozen=True)
class PrefillChunk:
    """Q query tokens of one sequence, rows `rows` of T. Without `span` the chunk's own keys are all there is.

    `mask` [Q, length] is True where a key is seen; None: the causal triangle.
    """

    rows: slice
    span: Span | None
    mask: Tensor | None

    @property
    def num_queries(self) -> int:
        """Q."""
        return int(self.rows.stop - self.rows.start)

    @property
    def num_keys(self) -> int:
        """How many are there to be seen; the last is the last query's own."""
        return self.num_queries if self.span is None else self.span.length


@dataclass(frozen=True)
class AttentionPlan:
    """All of a step's attention. `slots` [T] is where its tokens go in the cache; no query sees more than `window` keys."""

    slots: Tensor
    decodes: DecodeGroup | None
    chunks: tuple[PrefillChunk, ...]
    window: int | None


def plan_attention(batch: Batch, page_size: int, window: int | None) -> AttentionPlan:
    """Groups a batch's sequences; with a window, keys `window` or more tokens before a query are neither read nor seen."""
    decodes: list[int] = []
    decode_rows: list[int] = []
    chunks: list[PrefillChunk] = []
    row = 0
    for sequence, (num_queries, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if num_queries == 1:
            decodes.append(sequence)
            decode_rows.append(row)
        else:
            chunks.append(_plan_chunk(batch, sequence, slice(row, row + num_queries), context, page_size, window))
        row += num_queries
    group = _plan_decodes(batch, decodes, decode_rows, page_size, window) if decodes else None
    return AttentionPlan(batch.slots, group, tuple(chunks), window)


def _plan_decodes(batch: Batch, sequences: list[int], rows: list[int], page_size: int, window: int | None) -> DecodeGroup:
    device = batch.block_tables.device
    contexts = [batch.context_lens[sequence] for sequence in sequences]
    first_pages = [_first_page(context, 1, page_size, window) for context in contexts]
    length = max(context - page * page_size for context, page in zip(contexts, first_pages, strict=True))
    tables = batch.block_tables
    if len(sequences) < len(batch.query_lens):
        tables = tables[torch.tensor(sequences, device=device)]
    if any(first_pages):
        pages = torch.tensor(first_pages, device=device).unsqueeze(1) + torch.arange(-(-length // page_size), device=device)
        tables = tables.gather(1, pages.clamp(max=tables.shape[1] - 1))
    last = torch.tensor(contexts, device=device) - torch.tensor(first_pages, device=device) * page_size
    first = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
    mask = None
    if window is not None or min(contexts) < length:
        keys = torch.arange(length, device=device)
        mask = (keys < last.unsqueeze(1)) & (keys >= first.unsqueeze(1))
    is_all = len(rows) == len(batch.query_lens)
    return DecodeGroup(None if is_all else torch.tensor(rows, device=device), Span(tables, length), mask, first, last)


def _plan_chunk(batch: Batch, sequence: int, rows: slice, context: int, page_size: int, window: int | None) -> PrefillChunk:
    device = batch.block_tables.device
    num_queries = rows.stop - rows.start
    is_whole = num_queries == context
    if is_whole and (window is None or context <= window):
        return PrefillChunk(rows, None, None)
    page = 0 if is_whole else _first_page(context, num_queries, page_size, window)
    start = page * page_size
    queries = torch.arange(context - num_queries, context, device=device).unsqueeze(1)
    keys = torch.arange(start, context, device=device)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    span = None if is_whole else Span(batch.block_tables[sequence : sequence + 1, page:], context - start)
    return PrefillChunk(rows, span, mask)


def _first_page(context: int, num_queries: int, page_size: int, window: int | None) -> int:
    """The page of the first key that the first of the last `num_queries` tokens sees."""
    return 0 if window is None else max(0, context - num_queries + 1 - window) // page_size
