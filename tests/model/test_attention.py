"""What the plan of a step lets each query see, against the definition: keys p - window + 1 to p of its own sequence."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import AttentionPlan, Span, plan_attention
from model.batch import Batch

torch.set_num_threads(1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, int]:
    """A ragged batch over shuffled pages, and the page size."""
    page_size = draw(st.sampled_from([1, 3, 16]))
    lens = draw(st.lists(st.tuples(st.sampled_from([1, 1, 2, 5, 17]), st.integers(0, 40)), min_size=1, max_size=6))
    contexts = [query + before for query, before in lens]
    pages = list(range(sum(-(-context // page_size) for context in contexts) + 1))
    random.Random(draw(st.integers(0, 99))).shuffle(pages)
    tables = [[pages.pop() for _ in range(-(-context // page_size))] for context in contexts]
    width = max(map(len, tables))
    positions = [p for (query, before) in lens for p in range(before, before + query)]
    owners = [s for s, (query, _) in enumerate(lens) for _ in range(query)]
    slots = [tables[s][p // page_size] * page_size + p % page_size for s, p in zip(owners, positions, strict=True)]
    batch = Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        query_lens=tuple(query for query, _ in lens),
        context_lens=tuple(contexts),
        logit_rows=torch.tensor([0]),
        rope_lengths=torch.tensor(positions) + 1,
    )
    return batch, page_size


def expected_slots(batch: Batch, page_size: int, window: int | None) -> list[list[int]]:
    """For each of T queries the cache slots of the keys it sees."""
    seen = []
    for table, num_queries, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens, strict=True):
        for position in range(context - num_queries, context):
            first = 0 if window is None else max(0, position - window + 1)
            seen.append([table[p // page_size] * page_size + p % page_size for p in range(first, position + 1)])
    return seen


def slots_of(span: Span, row: int, page_size: int) -> Tensor:
    num_pages = -(-span.length // page_size)
    table = span.tables[row, :num_pages]
    return (table.unsqueeze(1) * page_size + torch.arange(page_size)).flatten()[: span.length]


def planned_slots(plan: AttentionPlan, batch: Batch, page_size: int) -> list[list[int]]:
    seen: list[list[int]] = [[] for _ in range(len(batch.token_ids))]
    if plan.decodes is not None:
        group = plan.decodes
        rows = range(len(batch.token_ids)) if group.rows is None else group.rows.tolist()
        for index, row in enumerate(rows):
            keys = slots_of(group.span, index, page_size)
            seen[row] = (keys if group.mask is None else keys[group.mask[index]]).tolist()
    for chunk in plan.chunks:
        num_queries = chunk.rows.stop - chunk.rows.start
        keys = plan.slots[chunk.rows] if chunk.span is None else slots_of(chunk.span, 0, page_size)
        mask = torch.ones(num_queries, num_queries, dtype=torch.bool).tril() if chunk.mask is None else chunk.mask
        for query in range(num_queries):
            seen[chunk.rows.start + query] = keys[mask[query]].tolist()
    return seen


@settings(max_examples=200, deadline=None)
@given(batches(), st.one_of(st.none(), st.integers(1, 50)))
def test_each_query_sees_its_keys(drawn: tuple[Batch, int], window: int | None) -> None:
    batch, page_size = drawn
    plan = plan_attention(batch, page_size, window)
    assert planned_slots(plan, batch, page_size) == expected_slots(batch, page_size, window)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 20))
def test_a_window_reads_no_page_before_it(drawn: tuple[Batch, int], window: int) -> None:
    batch, page_size = drawn
    plan = plan_attention(batch, page_size, window)
    spans = [chunk.span for chunk in plan.chunks] + [plan.decodes and plan.decodes.span]
    longest = max(batch.query_lens) + window + page_size
    assert all(span is None or span.length < longest for span in spans)
