"""The CPU kernel: whatever the number of tokens, the sizes, the storage and the threads, the sum that the reference gives."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import cpu_parts
from model.cpu_in_place import BLOCK_WORDS, compute_in_place
from model.experts import ExpertSlots, ExpertWeights, swiglu
from model.logical_expert import LogicalExpert
from model.weights import STORED_DTYPES
from tests.reference.experts import reference_experts

torch.set_num_threads(1)


def make_experts(num_experts, hidden_size, inner_size, dtype, generator):
    return [
        ExpertWeights(
            (torch.randn(2 * inner_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype),
            (torch.randn(hidden_size, inner_size, generator=generator) / inner_size**0.5).to(dtype),
        )
        for _ in range(num_experts)
    ]


def hold(experts, num_threads=1):
    return ExpertSlots(((LogicalExpert(0, expert), weights) for expert, weights in enumerate(experts)), num_threads)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    hidden_size=st.integers(1, 70),
    inner_size=st.integers(1, 40),
    dtype=st.sampled_from(STORED_DTYPES),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@example(counts=[1, 2, 3, 4, 5, 6, 7, 8], hidden_size=33, inner_size=17, dtype=torch.bfloat16, num_threads=2, seed=0)
def test_any_group_sizes(counts, hidden_size, inner_size, dtype, num_threads, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(len(counts), hidden_size, inner_size, dtype, generator)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts), generator=generator)]
    hidden, weights = torch.randn(len(ids), hidden_size, generator=generator), torch.rand(len(ids), 1, generator=generator)
    partial = hold(experts, num_threads).forward(0, hidden, ids[:, None], weights)
    expected = reference_experts(dict(enumerate(experts)), hidden, ids[:, None], weights)
    assert (partial.double() - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1.0)


def test_an_expert_of_hundreds_of_tokens_beside_experts_of_two():
    generator = torch.Generator().manual_seed(4)
    experts = make_experts(3, 32, 16, torch.bfloat16, generator)
    num_tokens = 300
    ids = torch.stack([torch.zeros(num_tokens, dtype=torch.int64), torch.full((num_tokens,), -1)], dim=1)
    ids[:2, 1], ids[2:4, 1] = 1, 2
    hidden, weights = torch.randn(num_tokens, 32, generator=generator), torch.rand(ids.shape, generator=generator)
    partial = hold(experts).forward(0, hidden, ids, weights)
    expected = reference_experts(dict(enumerate(experts)), hidden, ids, weights)
    assert (partial.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_gives_bit_for_bit_its_float32_copy(dtype):
    generator = torch.Generator().manual_seed(6)
    experts = make_experts(4, 64, 24, dtype, generator)
    experts[0].gate_up[0, :4] = torch.tensor([0.0, -0.0, 6e-8, -3e-5], dtype=dtype)  # zeros and subnormals
    widened = [ExpertWeights(expert.gate_up.float(), expert.down.float()) for expert in experts]
    hidden, weights = torch.randn(6, 64, generator=generator), torch.rand(6, 2, generator=generator)
    ids = torch.rand(6, 4, generator=generator).topk(2).indices
    assert torch.equal(hold(experts).forward(0, hidden, ids, weights), hold(widened).forward(0, hidden, ids, weights))


def test_threads_change_nothing():
    generator = torch.Generator().manual_seed(7)
    experts = make_experts(5, 48, 16, torch.float32, generator)
    hidden, weights = torch.randn(9, 48, generator=generator), torch.rand(9, 2, generator=generator)
    ids = torch.rand(9, 5, generator=generator).topk(2).indices
    alone = hold(experts, 1).forward(0, hidden, ids, weights)
    for num_threads in (2, 3, 8):
        assert torch.equal(hold(experts, num_threads).forward(0, hidden, ids, weights), alone)


def test_several_threads_may_call_at_once():
    generator = torch.Generator().manual_seed(8)
    slots = hold(make_experts(6, 48, 16, torch.bfloat16, generator), 2)
    hidden, weights = torch.randn(9, 48, generator=generator), torch.rand(9, 2, generator=generator)
    ids = torch.rand(9, 6, generator=generator).topk(2).indices
    expected = slots.forward(0, hidden, ids, weights)
    answers = []

    def call():
        answers.extend(slots.forward(0, hidden, ids, weights) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 60
    assert all(torch.equal(answer, expected) for answer in answers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_a_number_stays_one_and_spoils_no_other(bad):
    generator = torch.Generator().manual_seed(9)
    experts = make_experts(1, 16, 8, torch.float32, generator)
    hidden = torch.randn(3, 16, generator=generator)
    clean = hold(experts).forward(0, hidden, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    hidden[1, 5] = bad
    partial = hold(experts).forward(0, hidden, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert not partial[1].isfinite().any()
    assert torch.equal(partial[[0, 2]], clean[[0, 2]])
    assert not swiglu(experts[0], hidden)[1].isfinite().any()


def test_numba_stays_away_until_a_cpu_expert_is_loaded():
    check = "import sys, model.experts; model.experts.ExpertSlots(); assert 'numba' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], timeout=120, check=False).returncode == 0


class InPlace:
    """Batches for machine code to compute, as a listener's thread does."""

    def __init__(self, slots, max_bytes=1 << 20):
        self.table = slots.open_in_place(max_bytes)
        self._block = np.empty(BLOCK_WORDS, np.int64)

    def __call__(self, layer, hidden, ids, weights):
        """The partial sums, or None where it was not computed."""
        ids, partial = ids.to(torch.int16), torch.full(hidden.shape, 9.0)
        places = [tensor.data_ptr() for tensor in (hidden, ids, weights, partial)]
        if compute_in_place(self.table.address, self._block, layer, *places, *hidden.shape, ids.shape[1]):
            return partial
        assert (partial == 9.0).all() or partial.eq(0).all()  # nothing was added
        return None


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_batches_in_place_are_what_forward_gives(num_threads, dtype):
    generator = torch.Generator().manual_seed(8)
    experts = make_experts(4, 24, 8, dtype, generator)
    hidden, weights = torch.randn(5, 24, generator=generator), torch.rand(5, 2, generator=generator)
    ids = torch.rand(5, 4, generator=generator).topk(2).indices
    ids[0, 0] = -1
    slots = hold(experts, num_threads)
    in_place = InPlace(slots)
    assert torch.equal(in_place(0, hidden, ids, weights), slots.forward(0, hidden, ids, weights))
    assert (in_place.table.num_frames, in_place.table.num_tokens) == (1, 5)
    assert in_place.table.busy_s > 0
    assert torch.equal(in_place(0, hidden, ids * 0 - 1, weights), torch.zeros(5, 24))  # nobody's choices


def test_what_is_not_small_or_not_here_is_left_to_forward():
    experts = make_experts(2, 24, 8, torch.float32, torch.Generator().manual_seed(9))
    slots, one, token = hold(experts), torch.zeros(1, 1), torch.ones(1, 24)
    many = 60
    in_place = InPlace(slots)
    assert in_place(0, token, one, one) is not None
    assert InPlace(slots, max_bytes=1)(0, token, one, one) is None
    assert in_place(0, token, one + 2, one) is None
    assert in_place(0, token, one - 2, one) is None
    assert in_place(0, torch.ones(1, 23), one, one) is None
    for layer in (1, -1, 1023, 1024, 1 << 31):
        assert in_place(layer, token, one, one) is None
    bytes_of_nine = 9 * experts[0].num_bytes
    assert InPlace(slots, bytes_of_nine)(0, torch.ones(many, 24), torch.zeros(many, 1), torch.zeros(many, 1)) is None
    in_place.table.close()
    assert in_place(0, token, one, one) is None


def test_slots_with_a_forward_of_their_own_are_not_computed_in_place():
    class Doubled(ExpertSlots):
        def forward(self, layer, hidden, expert_ids, weights):
            return 2 * super().forward(layer, hidden, expert_ids, weights)

    assert Doubled().open_in_place(1 << 20) is None


def test_experts_come_and_go_while_they_are_computed_in_place():
    """Weights that nobody holds any more are overwritten: who still read them would give other sums."""
    generator = torch.Generator().manual_seed(10)
    experts = make_experts(3, 64, 32, torch.float32, generator)
    slots, hidden, weights = hold(experts), torch.randn(4, 64, generator=generator), torch.ones(4, 1)
    in_place, ids = InPlace(slots), torch.tensor([[0], [1], [2], [1]])
    expected = slots.forward(0, hidden, ids, weights)
    seen, ends = {"whole": 0, "left": 0}, threading.Event()
    wrong = []

    def compute():
        while not ends.is_set():
            partial = in_place(0, hidden, ids, weights)
            seen["left" if partial is None else "whole"] += 1
            if partial is not None and not torch.equal(partial, expected):
                wrong.append(partial)

    reader = threading.Thread(target=compute)
    reader.start()
    try:
        deadline = time.monotonic() + 60
        while min(seen.values()) < 50 and time.monotonic() < deadline:
            copy = ExpertWeights(experts[1].gate_up.clone(), experts[1].down.clone())
            slots.load(LogicalExpert(0, 1), copy)
            slots.unload(LogicalExpert(0, 1))
            copy.gate_up.fill_(float("nan"))
            copy.down.fill_(float("nan"))
    finally:
        ends.set()
        reader.join(60)
    assert not wrong
    assert min(seen.values()) >= 50


def test_experts_that_come_and_go_compile_nothing(monkeypatch):
    slots = hold(make_experts(2, 16, 8, torch.float32, torch.Generator().manual_seed(11)))
    monkeypatch.setattr(cpu_parts, "cfunc", None)
    num_jobs = len(cpu_parts._jobs)
    for _ in range(3):
        expert = make_experts(1, 16, 8, torch.float32, torch.Generator().manual_seed(12))[0]
        slots.load(LogicalExpert(0, 2), expert)
        slots.unload(LogicalExpert(0, 2))
    assert len(cpu_parts._jobs) == num_jobs
