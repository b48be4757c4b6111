import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.request import Request, SamplingParams
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import build_step
from tests.reference.step import build_step_slowly

torch.set_num_threads(1)


@st.composite
def schedulers(draw):
    """A scheduler some steps into a random load, preemptions and resumed requests included."""
    scheduler = Scheduler(
        num_pages=draw(st.integers(6, 14)),
        page_size=draw(st.integers(1, 5)),
        max_batch_tokens=draw(st.integers(4, 40)),
        max_running=4,
        max_waiting=9,
        prefill_chunk=draw(st.integers(1, 12)),
    )
    for number in range(draw(st.integers(1, 6))):
        num_generated = draw(st.integers(0, 2))
        request = Request(
            request_id=str(number),
            prompt_token_ids=tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))),
            generated_token_ids=tuple(range(num_generated)),
            sampling=SamplingParams(max_tokens=4, prompt_logprobs=draw(st.sampled_from([None, 0, 2]))),
        )
        scheduler.add(Sequence(request))
    return scheduler, draw(st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(schedulers())
def test_agrees_with_one_token_at_a_time(loaded):
    scheduler, num_steps = loaded
    for _ in range(num_steps + 1):
        chunks = scheduler.schedule()
        if not chunks:
            return
        step = build_step(chunks, scheduler.page_size, torch.device("cpu"))
        slow = build_step_slowly(chunks, scheduler.page_size)
        batch = step.batch
        assert batch.token_ids.tolist() == slow.token_ids
        assert batch.positions.tolist() == slow.positions
        assert batch.slots.tolist() == slow.slots
        assert batch.rope_lengths.tolist() == slow.rope_lengths
        assert batch.logit_rows.tolist() == slow.logit_rows
        assert [sequence.request_id for sequence in step.sampled] == slow.sampled
        assert step.sample_rows.tolist() == slow.sample_rows
        ranked = [
            (rows.sequence.request_id, rows.position + i, rows.first_row + i) for rows in step.prompt_rows for i in range(rows.num_rows)
        ]
        assert ranked == slow.prompt_tokens
        assert batch.query_lens == tuple(chunk.num_tokens for chunk in chunks)
        assert batch.context_lens == tuple(chunk.start + chunk.num_tokens for chunk in chunks)
        for table, chunk, length in zip(batch.block_tables.tolist(), chunks, batch.context_lens, strict=True):
            num_pages = -(-length // scheduler.page_size)
            assert table == chunk.sequence.pages[:num_pages].tolist() + [0] * (len(table) - num_pages)
        for rows in step.prompt_rows:
            rows.sequence.prompt_logprobs += [None] * rows.num_rows
        scheduler.commit(chunks)
        for sequence in step.sampled:
            sequence.owes_prompt_logprobs = False
            sequence.append(7)
            if sequence.num_generated == 4:
                scheduler.remove(sequence)
