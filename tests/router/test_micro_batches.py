"""One micro-batch or two: what is measured decides, and whatever is chosen, the tokens are the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Batch
from router.engine import Engine
from router.errors import ExpertsUnavailable
from router.forward import run_forwards
from router.micro_batches import LONGEST_PAUSE, TRIAL_STEPS, MicroBatches
from tests.fixed_micro_batches import Always
from tests.reference.local_generation import LocalGenerator
from tests.router.test_engine import NUM_TOKENS, PROMPTS, expected, make_engine, make_request, run
from tests.tiny_models import assert_greedy_equal, write_tiny

torch.set_num_threads(1)


def drive(
    chooser: MicroBatches, num_steps: int, one_s: float, two_s: float, waited_s: float, size: tuple[int, int] = (32, 32)
) -> list[int]:
    """What it chose for steps that take so long."""
    chosen = []
    for _ in range(num_steps):
        chosen.append(chooser.number_for(*size))
        chooser.observe(*size, chosen[-1], one_s if chosen[-1] == 1 else two_s, waited_s if chosen[-1] == 1 else 0.0)
    return chosen


def test_two_are_taken_where_they_are_faster():
    chosen = drive(MicroBatches(), 400, 0.030, 0.020, 0.012)
    assert set(chosen[:4]) == {1}
    assert chosen[100:].count(2) > 0.9 * 300


def test_one_is_taken_where_two_are_slower_and_they_are_tried_ever_more_seldom():
    chosen = drive(MicroBatches(), 4 * LONGEST_PAUSE, 0.020, 0.030, 0.006)
    tried = [place for place, number in enumerate(chosen) if number == 2]
    assert 8 <= len(tried) <= 40
    assert not [place for place in tried if 1024 <= place < 2 * 1024 - 200]


def test_where_nothing_is_waited_for_two_are_never_tried():
    assert set(drive(MicroBatches(), 500, 0.020, 0.010, 0.001)) == {1}


def test_what_was_faster_is_given_up_when_it_no_longer_is():
    chooser = MicroBatches()
    drive(chooser, 100, 0.030, 0.020, 0.012)
    assert drive(chooser, 400, 0.020, 0.030, 0.005)[-100:].count(2) < 10


def test_one_slow_step_decides_nothing():
    chooser = MicroBatches()
    drive(chooser, 100, 0.030, 0.020, 0.012)
    chooser.observe(32, 32, 2, 5.0, 0.0)
    assert drive(chooser, 60, 0.030, 0.020, 0.012).count(1) <= 2 * TRIAL_STEPS


def test_the_first_steps_may_be_slow():
    chooser = MicroBatches()
    chooser.observe(32, 32, 1, 2.0, 1.9)
    assert drive(chooser, 300, 0.020, 0.025, 0.006)[10:].count(2) <= 15


def test_nothing_is_decided_without_a_trial():
    chooser = MicroBatches()
    drive(chooser, 100, 0.024, 0.025, 0.006)
    assert set(drive(chooser, 200, 0.030, 0.025, 0.003)) == {1}


def test_where_two_always_fail_one_is_taken():
    assert drive(MicroBatches(), 300, 0.030, math.inf, 0.012).count(2) <= 20


def test_sizes_are_learned_apart_and_one_sequence_is_never_split():
    chooser = MicroBatches()
    drive(chooser, 100, 0.030, 0.020, 0.012)
    assert chooser.number_for(32, 32) == chooser.number_for(33, 33) == 2
    assert chooser.number_for(64, 64) == 1
    assert chooser.number_for(32, 2) == 1
    assert set(drive(chooser, 200, 0.030, 0.010, 0.012, (512, 1))) == {1}


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=7), data=st.data())
def test_the_two_parts_are_the_batch(lengths, data):
    num_tokens, num_sequences = sum(lengths), len(lengths)
    logit_rows = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1))))
    token = torch.arange(num_tokens)
    tables = torch.arange(3 * num_sequences).view(num_sequences, 3)
    batch = Batch(
        token, token + 1, token + 2, tables, tuple(lengths), tuple(9 + n for n in lengths), torch.tensor(logit_rows).long(), token + 3
    )
    first, second = batch.split()
    for name in ("token_ids", "positions", "slots", "block_tables", "rope_lengths"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(batch, name))
    assert first.query_lens + second.query_lens == batch.query_lens
    assert first.context_lens + second.context_lens == batch.context_lens
    assert [*first.logit_rows.tolist(), *(second.logit_rows + len(first.token_ids)).tolist()] == logit_rows
    cuts = [sum(lengths[:place]) for place in range(1, num_sequences)]
    assert abs(2 * len(first.token_ids) - num_tokens) == min(abs(2 * cut - num_tokens) for cut in cuts)


def split_engine(local: LocalGenerator, **given) -> Engine:
    engine = make_engine(local, **given)
    engine._micro_batches = Always(2)
    return engine


@pytest.mark.parametrize("name", ["v2-groups", "v3-dynamic", "mixtral-window", "llama-llama3"])
def test_two_give_the_tokens_of_each_alone(name, tmp_path):
    local = LocalGenerator.load(write_tiny(name, tmp_path), num_pages=1)
    engine = split_engine(local, prefill_chunk=7)
    answers = run(engine, [make_request(str(number), prompt) for number, prompt in enumerate(PROMPTS)])
    for number, prompt in enumerate(PROMPTS):
        alone = expected(name, prompt)
        assert_greedy_equal(answers[str(number)].token_ids, alone.token_ids, alone.margins)
    assert engine.load.num_split_steps > NUM_TOKENS


class Watched:
    """Experts that fail at the `fails_at`-th answer, and know which handles are open."""

    def __init__(self, experts, fails_at: int) -> None:
        self.experts, self.fails_at = experts, fails_at
        self.open: set[int] = set()
        self.most_open = self.num_answers = 0

    def dispatch(self, layer, hidden, routing):
        handle = self.experts.dispatch(layer, hidden, routing)
        self.open.add(id(handle))
        self.most_open = max(self.most_open, len(self.open))
        return handle

    def combine(self, handle):
        self.open.remove(id(handle))
        self.num_answers += 1
        if self.num_answers == self.fails_at:
            raise ExpertsUnavailable("no answer")
        return self.experts.combine(handle)

    def abandon(self, handle):
        self.open.remove(id(handle))
        self.experts.abandon(handle)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_two_are_under_way_at_once_and_a_failure_leaves_none_open(fails_at, tmp_path):
    local = LocalGenerator.load(write_tiny("v2-lite", tmp_path), num_pages=1)
    experts = Watched(local.experts, fails_at)
    engine = split_engine(local, experts=experts)
    answers = run(engine, [make_request(str(number), PROMPTS[number], max_tokens=1) for number in range(3)])
    assert experts.most_open == 2
    assert not experts.open
    assert {answer.finish for answer in answers.values()} == ({"error"} if fails_at else {"length"})


def test_passes_of_a_model_without_experts_need_none(tmp_path):
    local = LocalGenerator.load(write_tiny("llama", tmp_path), num_pages=4)
    token = torch.zeros(1, dtype=torch.int64)
    batches = [Batch(token, token, token + 16 * n, token[:, None] + n, (1,), (1,), token, token + 1) for n in range(2)]
    logits, waited_s = run_forwards([local.model.forward(batch, local.cache) for batch in batches], local.model, local.experts)
    assert torch.equal(logits[0], logits[1])
    assert waited_s == 0.0
