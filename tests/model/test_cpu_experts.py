"""The CPU kernel: whatever the number of tokens, the sizes, the storage and the threads, the sum that the reference gives."""

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.experts import ExpertSlots, ExpertWeights, HostBatch, swiglu
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


def host_batch(hidden, ids, weights):
    return HostBatch(hidden.numpy(), ids.to(torch.int16).numpy(), weights.numpy(), torch.full(hidden.shape, 9.0).numpy())


@pytest.mark.parametrize("num_threads", [1, 2])
def test_small_batches_in_place_are_what_forward_gives(num_threads):
    generator = torch.Generator().manual_seed(8)
    experts = make_experts(4, 24, 8, torch.bfloat16, generator)
    hidden, weights = torch.randn(5, 24, generator=generator), torch.rand(5, 2, generator=generator)
    ids = torch.rand(5, 4, generator=generator).topk(2).indices
    ids[0, 0] = -1
    batch = host_batch(hidden, ids, weights)
    slots = hold(experts, num_threads)
    assert slots.compute_small(0, batch, max_bytes=1 << 20)
    assert torch.equal(torch.from_numpy(batch.partial), slots.forward(0, hidden, ids, weights))


def test_what_is_not_small_or_not_here_is_left_to_forward():
    experts = make_experts(2, 24, 8, torch.float32, torch.Generator().manual_seed(9))
    slots, one = hold(experts), torch.zeros(1, 1)
    many = 60
    assert slots.compute_small(0, host_batch(torch.ones(1, 24), one, one), max_bytes=1 << 20)
    assert not slots.compute_small(0, host_batch(torch.ones(1, 24), one, one), max_bytes=1)
    assert not slots.compute_small(0, host_batch(torch.ones(1, 24), one + 2, one), max_bytes=1 << 20)
    assert not slots.compute_small(0, host_batch(torch.ones(1, 23), one, one), max_bytes=1 << 20)
    assert not slots.compute_small(1, host_batch(torch.ones(1, 24), one, one), max_bytes=1 << 20)
    assert not slots.compute_small(
        0, host_batch(torch.ones(many, 24), torch.zeros(many, 1), torch.zeros(many, 1)), max_bytes=9 * experts[0].gate_up.nbytes
    )
