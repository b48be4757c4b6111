"""One step's chunks as tensors: the token batch that the model is given, and which logits belong to whom."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from router.kv_blocks import pages_for
from router.scheduler import Chunk
from router.sequence import Sequence


@dataclass(frozen=True)
class PromptRows:
    """`num_rows` rows of the logits from `first_row`: what the model says of a prompt's tokens from `position`."""

    sequence: Sequence
    first_row: int
    position: int
    num_rows: int


@dataclass(frozen=True)
class Step:
    """The batch; `sampled` sequences get a token each from logits rows `sample_rows`; `prompt_rows` are ranked."""

    batch: Batch
    sampled: tuple[Sequence, ...]
    sample_rows: NDArray[np.int64]
    prompt_rows: tuple[PromptRows, ...]


def build_step(chunks: Many[Chunk], page_size: int, device: torch.device) -> Step:
    """Lays the chunks end to end. Everything is put together on the host and copied to the device at once."""
    sequences = [chunk.sequence for chunk in chunks]
    starts = np.array([chunk.start for chunk in chunks])
    lengths = np.array([chunk.num_tokens for chunk in chunks])
    num_prompt = np.array([sequence.num_prompt for sequence in sequences])
    ends = lengths.cumsum()
    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(ends[-1]) + (starts - (ends - lengths))[owner]

    tables = np.zeros((len(chunks), max(pages_for(chunk.end, page_size) for chunk in chunks)), dtype=np.int64)
    for table, chunk in zip(tables, chunks, strict=True):
        pages = chunk.sequence.pages[: pages_for(chunk.end, page_size)]
        table[: len(pages)] = pages

    token_ids = np.concatenate([chunk.sequence.token_ids[chunk.start : chunk.end] for chunk in chunks])
    slots = tables[owner, positions // page_size] * page_size + positions % page_size
    # A generated token was first computed when it was the last one: recomputing it must scale RoPE as then.
    rope_lengths = np.where(positions < num_prompt[owner], num_prompt[owner], positions + 1)
    logit_rows, sample_rows, prompt_rows = _logit_rows(chunks, ends)

    parts = (token_ids, positions, slots, rope_lengths, logit_rows, tables.ravel())
    packed = torch.from_numpy(np.concatenate(parts)).to(device)
    on_device = torch.tensor_split(packed, np.cumsum([len(part) for part in parts])[:-1].tolist())
    batch = Batch(
        token_ids=on_device[0],
        positions=on_device[1],
        slots=on_device[2],
        block_tables=on_device[5].view(tables.shape),
        query_lens=tuple(chunk.num_tokens for chunk in chunks),
        context_lens=tuple(chunk.end for chunk in chunks),
        logit_rows=on_device[4],
        rope_lengths=on_device[3],
    )
    return Step(batch, tuple(chunk.sequence for chunk in chunks if chunk.is_last), sample_rows, prompt_rows)


def _logit_rows(chunks: Many[Chunk], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[PromptRows, ...]]:
    """Indices into the tokens whose logits are wanted; which of those rows are sampled; which rank prompt tokens.

    The logits at position p judge the token at p + 1. Prompt positions ranked before a preemption are not asked for again.
    """
    wanted: list[NDArray[np.int64]] = []
    sample_rows: list[int] = []
    prompt_rows: list[PromptRows] = []
    num_rows = 0
    for chunk, end in zip(chunks, ends.tolist(), strict=True):
        sequence = chunk.sequence
        offset = end - chunk.num_tokens - chunk.start
        if sequence.owes_prompt_logprobs:
            first = max(chunk.start, len(sequence.prompt_logprobs) - 1)
            last = min(chunk.end, sequence.num_prompt - 1)
            if first < last:
                wanted.append(np.arange(first, last) + offset)
                prompt_rows.append(PromptRows(sequence, num_rows, first + 1, last - first))
                num_rows += last - first
        if chunk.is_last:
            wanted.append(np.array([end - 1]))
            sample_rows.append(num_rows)
            num_rows += 1
    rows = np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64)
    return rows, np.array(sample_rows, dtype=np.int64), tuple(prompt_rows)
