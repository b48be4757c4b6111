import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest, QueueFull
from router.kv_blocks import pages_for
from router.request import Request, SamplingParams
from router.scheduler import Scheduler
from router.sequence import Sequence, SequenceStatus


def make_scheduler(**limits) -> Scheduler:
    sizes = {"num_pages": 64, "page_size": 4, "max_batch_tokens": 32, "max_running": 8, "max_waiting": 64, "prefill_chunk": 16}
    return Scheduler(**{**sizes, **limits})


def make_sequence(name: str, num_prompt: int, max_tokens: int, num_generated: int = 0, deadline: float | None = None) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(
        Request(request_id=name, prompt_token_ids=(7,) * num_prompt, generated_token_ids=(8,) * num_generated, sampling=sampling),
        deadline=deadline,
    )


def run_step(scheduler: Scheduler) -> list[str]:
    """Schedules and computes a step; the names of those that finished with it."""
    chunks = scheduler.schedule()
    scheduler.commit(chunks)
    finished = []
    for chunk in chunks:
        if chunk.is_last:
            chunk.sequence.append(9)
            if chunk.sequence.num_generated >= chunk.sequence.request.sampling.max_tokens:
                scheduler.remove(chunk.sequence)
                finished.append(chunk.sequence.request_id)
    return finished


def check_invariants(scheduler: Scheduler, order: dict[Sequence, int]) -> None:
    held = [int(page) for sequence in scheduler.running for page in sequence.pages]
    assert len(set(held)) == len(held)
    assert scheduler.pages.num_free == scheduler.pages.num_pages - len(held)
    assert all(len(sequence.pages) == 0 and sequence.num_computed == 0 for sequence in scheduler.waiting)
    arrivals = [order[sequence] for sequence in (*scheduler.running, *scheduler.waiting)]
    assert arrivals == sorted(arrivals), "all that run are older than all that wait"
    assert {s.status for s in scheduler.running} <= {SequenceStatus.RUNNING}
    assert {s.status for s in scheduler.waiting} <= {SequenceStatus.WAITING}


@st.composite
def workloads(draw):
    page_size = draw(st.integers(1, 5))
    num_pages = draw(st.integers(2, 12))
    capacity = page_size * num_pages
    limits = {
        "page_size": page_size,
        "num_pages": num_pages,
        "max_batch_tokens": draw(st.integers(1, 12)),
        "max_running": draw(st.integers(1, 6)),
        "prefill_chunk": draw(st.integers(1, 8)),
    }
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        num_prompt = draw(st.integers(1, capacity))
        max_tokens = draw(st.integers(1, capacity - num_prompt + 1))
        num_generated = draw(st.integers(0, max_tokens - 1))
        cancelled_at = draw(st.one_of(st.none(), st.integers(0, 40)))
        arrivals.append((draw(st.integers(0, 30)), num_prompt, max_tokens, num_generated, cancelled_at))
    return limits, sorted(arrivals, key=lambda arrival: arrival[0])


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_everybody_finishes_and_no_page_is_lost(workload):
    limits, arrivals = workload
    scheduler = make_scheduler(**limits)
    order: dict[Sequence, int] = {}
    finished: set[str] = set()
    cancelled: set[str] = set()
    cancel_at: dict[Sequence, int] = {}
    pending = list(arrivals)
    step = 0
    while pending or scheduler.running or scheduler.waiting:
        while pending and pending[0][0] <= step:
            _, num_prompt, max_tokens, num_generated, cancelled_at = pending.pop(0)
            sequence = make_sequence(str(len(order)), num_prompt, max_tokens, num_generated)
            scheduler.add(sequence)
            if cancelled_at is not None:
                cancel_at[sequence] = step + cancelled_at
            order[sequence] = len(order)
        for sequence, when in cancel_at.items():
            if when <= step and sequence.status is not SequenceStatus.GONE:
                scheduler.remove(sequence)
                cancelled.add(sequence.request_id)
        oldest = min((s for s in order if s.status is not SequenceStatus.GONE), key=order.__getitem__, default=None)
        before = (oldest.num_computed, oldest.num_tokens) if oldest else None

        chunks = scheduler.schedule()
        check_invariants(scheduler, order)
        assert sum(chunk.num_tokens for chunk in chunks) <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.max_running
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.status is SequenceStatus.RUNNING
            assert chunk.start == sequence.num_computed
            assert 1 <= chunk.num_tokens <= scheduler.prefill_chunk
            assert pages_for(chunk.end, scheduler.page_size) <= len(sequence.pages)
            assert chunk.is_last == (chunk.end == sequence.num_tokens)
        prefills = [not (chunk.is_last and chunk.num_tokens == 1 and chunk.start > 0) for chunk in chunks]
        assert prefills == sorted(prefills), "who only lacks one token comes before who lacks more"

        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.is_last:
                chunk.sequence.append(9)
                if chunk.sequence.num_generated >= chunk.sequence.request.sampling.max_tokens:
                    scheduler.remove(chunk.sequence)
                    finished.add(chunk.sequence.request_id)
        if oldest is not None:
            progressed = oldest.status is SequenceStatus.GONE or (oldest.num_computed, oldest.num_tokens) > before
            assert progressed, "the oldest goes on in every step: nobody starves"
        step += 1
        assert step < 5_000
    assert finished | cancelled == {sequence.request_id for sequence in order}
    assert scheduler.pages.num_free == scheduler.pages.num_pages


@settings(max_examples=150, deadline=None)
@given(workloads(), st.data())
def test_the_isolated_are_alone_until_what_was_computed_with_others_is_computed_again(workload, data):
    limits, arrivals = workload
    scheduler = make_scheduler(**limits)
    sequences = [make_sequence(str(number), *arrival[1:4]) for number, arrival in enumerate(arrivals)]
    for sequence in sequences:
        scheduler.add(sequence)
    isolated: dict[Sequence, int] = {}
    num_steps = 0
    while scheduler.running or scheduler.waiting:
        chunks = scheduler.schedule()
        num_steps += 1
        assert num_steps < 5_000
        if any(chunk.sequence in isolated for chunk in chunks):
            assert len(chunks) == 1
        if len(chunks) > 1 and num_steps < 40 and data.draw(st.booleans(), "fails"):
            scheduler.isolate(chunks)
            isolated.update((chunk.sequence, chunk.end) for chunk in chunks)
            continue
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.end >= isolated.get(chunk.sequence, chunk.end):
                isolated.pop(chunk.sequence, None)
            if chunk.is_last:
                chunk.sequence.append(9)
                if chunk.sequence.num_generated >= chunk.sequence.request.sampling.max_tokens:
                    scheduler.remove(chunk.sequence)
    assert not isolated
    assert scheduler.pages.num_free == scheduler.pages.num_pages


def test_an_isolated_sequence_that_is_removed_sets_the_others_free():
    scheduler = make_scheduler()
    first, second = make_sequence("a", 3, 5), make_sequence("b", 3, 5)
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduler.isolate(scheduler.schedule())
    assert [chunk.sequence for chunk in scheduler.schedule()] == [first]
    scheduler.remove(first)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [second]
    run_step(scheduler)
    scheduler.add(make_sequence("c", 3, 5))
    assert len(scheduler.schedule()) == 2


def test_decodes_come_before_prefill_chunks_and_share_the_step():
    scheduler = make_scheduler(max_batch_tokens=10, prefill_chunk=6)
    scheduler.add(make_sequence("short", 3, 8))
    scheduler.add(make_sequence("long", 20, 4))
    first = [(c.sequence.request_id, c.start, c.num_tokens, c.is_last) for c in scheduler.schedule()]
    assert first == [("short", 0, 3, True), ("long", 0, 6, False)]
    scheduler = make_scheduler(max_batch_tokens=10, prefill_chunk=6)
    scheduler.add(make_sequence("long", 20, 4))
    scheduler.add(make_sequence("short", 3, 8))
    run_step(scheduler)
    scheduler.add(make_sequence("late", 9, 4))
    second = [(c.sequence.request_id, c.start, c.num_tokens, c.is_last) for c in scheduler.schedule()]
    assert second == [("short", 3, 1, True), ("long", 6, 6, False), ("late", 0, 3, False)]


def test_the_youngest_gives_way_and_keeps_what_it_generated():
    scheduler = make_scheduler(num_pages=4, page_size=4)
    old, young = make_sequence("old", 8, 9), make_sequence("young", 7, 5)
    scheduler.add(old)
    scheduler.add(young)
    assert run_step(scheduler) == []
    assert [s.request_id for s in scheduler.running] == ["old"], "young waits: it would leave old no page to grow into"
    scheduler = make_scheduler(num_pages=6, page_size=4)
    scheduler.add(old := make_sequence("old", 8, 17))
    scheduler.add(young := make_sequence("young", 8, 9))
    run_step(scheduler)
    assert len(scheduler.running) == 2
    while young.status is SequenceStatus.RUNNING:
        run_step(scheduler)
    assert (young.num_generated, young.num_computed, len(young.pages)) == (5, 0, 0)
    assert scheduler.waiting[0] is young
    assert scheduler.num_preemptions == 1
    while old.status is not SequenceStatus.GONE:
        run_step(scheduler)
    chunks = scheduler.schedule()
    assert [(c.sequence, c.start, c.num_tokens, c.is_last) for c in chunks] == [(young, 0, 13, True)]


def test_nobody_overtakes_the_head_of_the_queue():
    scheduler = make_scheduler(num_pages=4, page_size=4)
    scheduler.add(make_sequence("running", 9, 4))
    run_step(scheduler)
    scheduler.add(make_sequence("big", 10, 4))
    scheduler.add(make_sequence("small", 1, 1))
    run_step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["running"]
    assert [s.request_id for s in scheduler.waiting] == ["big", "small"]


@pytest.mark.parametrize(("num_prompt", "max_tokens", "field"), [(17, 1, "prompt_token_ids"), (16, 2, "max_tokens"), (1, 17, "max_tokens")])
def test_what_can_never_fit_is_refused(num_prompt, max_tokens, field):
    scheduler = make_scheduler(num_pages=4, page_size=4)
    with pytest.raises(InvalidRequest) as refused:
        scheduler.add(make_sequence("big", num_prompt, max_tokens))
    assert refused.value.field == field
    scheduler.add(make_sequence("just", num_prompt - 1, max_tokens if num_prompt > 1 else 1))


def test_what_just_fits_finishes():
    scheduler = make_scheduler(num_pages=4, page_size=4)
    scheduler.add(make_sequence("just", 10, 7))
    finished = []
    for _ in range(8):
        finished += run_step(scheduler)
    assert finished == ["just"]


def test_a_full_queue_refuses():
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_sequence("a", 1, 1))
    scheduler.add(make_sequence("b", 1, 1))
    with pytest.raises(QueueFull):
        scheduler.add(make_sequence("c", 1, 1))
    run_step(scheduler)
    scheduler.add(make_sequence("c", 1, 1))


def test_expired_names_those_past_their_deadline_wherever_they_are():
    scheduler = make_scheduler(max_running=2)
    deadlines = {"runs": 5.0, "runs on": None, "waits": 4.0, "waits on": 6.0}
    for name, deadline in deadlines.items():
        scheduler.add(make_sequence(name, 4, 4, deadline=deadline))
    run_step(scheduler)
    assert scheduler.expired(3.0) == []
    assert [s.request_id for s in scheduler.expired(5.0)] == ["runs", "waits"]


def test_removing_twice_is_harmless():
    scheduler = make_scheduler()
    scheduler.add(sequence := make_sequence("a", 5, 3))
    run_step(scheduler)
    assert scheduler.pages.num_free == 62
    scheduler.remove(sequence)
    scheduler.remove(sequence)
    assert scheduler.pages.num_free == 64
