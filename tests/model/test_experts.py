import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ExpertNotHeld, ModelError
from model.experts import ExpertSlots, ExpertWeights, LocalExperts
from model.gate import Routing
from model.logical_expert import LogicalExpert
from tests.reference.experts import reference_experts

torch.set_num_threads(1)
LAYER = 3


def make_experts(num_experts, hidden_size, inner_size, dtype, generator):
    return {
        expert: ExpertWeights(
            (torch.randn(2 * inner_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype),
            (torch.randn(hidden_size, inner_size, generator=generator) / inner_size**0.5).to(dtype),
        )
        for expert in range(num_experts)
    }


def hold(experts):
    return ExpertSlots((LogicalExpert(LAYER, expert), weights) for expert, weights in experts.items())


def make_choices(num_tokens, num_experts, top_k, generator, away=0.0):
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    ids[torch.rand(ids.shape, generator=generator) < away] = -1
    return ids, torch.rand(ids.shape, generator=generator)


def assert_close_to_reference(partial, experts, hidden, ids, weights, tolerance=1e-5):
    expected = reference_experts(experts, hidden, ids, weights)
    assert partial.dtype == torch.float32
    assert (partial.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden_size=st.sampled_from([1, 7, 32, 72]),
    inner_size=st.sampled_from([1, 5, 16, 48]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    id_dtype=st.sampled_from([torch.int16, torch.int64]),
    away=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_token_by_token_sum(num_tokens, num_experts, top_k, hidden_size, inner_size, dtype, id_dtype, away, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(num_experts, hidden_size, inner_size, dtype, generator)
    ids, weights = make_choices(num_tokens, num_experts, min(top_k, num_experts), generator, away)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    partial = hold(experts).forward(LAYER, hidden, ids.to(id_dtype), weights)
    assert_close_to_reference(partial, experts, hidden, ids, weights)


def test_other_devices_take_the_torch_path():
    """On `meta` no id can be read back, so the ids stay on the CPU, as they arrive at a host."""
    weights = ExpertWeights(
        torch.empty(8, 16, device="meta", dtype=torch.bfloat16), torch.empty(16, 4, device="meta", dtype=torch.bfloat16)
    )
    slots = ExpertSlots((LogicalExpert(LAYER, expert), weights) for expert in range(2))
    hidden = torch.empty(3, 16, device="meta", dtype=torch.bfloat16)
    partial = slots.forward(LAYER, hidden, torch.tensor([[0, 1], [1, -1], [0, 1]]), torch.ones(3, 2))
    assert (partial.shape, partial.dtype, partial.device.type) == ((3, 16), torch.float32, "meta")


def test_partial_sums_of_two_hosts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(5)
    experts = make_experts(8, 24, 16, torch.float32, generator)
    ids, weights = make_choices(20, 8, 3, generator)
    hidden = torch.randn(20, 24, generator=generator)
    halves = [
        hold({e: w for e, w in experts.items() if e % 2 == parity}).forward(LAYER, hidden, ids.where(ids % 2 == parity, -1), weights)
        for parity in (0, 1)
    ]
    assert_close_to_reference(halves[0] + halves[1], experts, hidden, ids, weights)


def test_an_empty_batch_gives_an_empty_sum():
    slots = hold(make_experts(2, 8, 4, torch.float32, torch.Generator().manual_seed(0)))
    partial = slots.forward(LAYER, torch.empty(0, 8), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert partial.shape == (0, 8)


def test_names_every_expert_that_is_not_held():
    slots = hold(make_experts(2, 8, 4, torch.float32, torch.Generator().manual_seed(0)))
    ids = torch.tensor([[0, 7], [1, 9]])
    with pytest.raises(ExpertNotHeld, match="layer 3 expert 7, layer 3 expert 9") as caught:
        slots.forward(LAYER, torch.zeros(2, 8), ids, torch.ones(2, 2))
    assert caught.value.experts == ((LAYER, 7), (LAYER, 9))
    assert caught.value.kind == "expert_not_held"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ExpertNotHeld):
        slots.forward(LAYER + 1, torch.zeros(1, 8), torch.tensor([[0]]), torch.ones(1, 1))
    with pytest.raises(ExpertNotHeld, match="expert -2"):
        slots.forward(LAYER, torch.zeros(1, 8), torch.tensor([[-2]]), torch.ones(1, 1))


def test_load_and_unload_come_in_pairs():
    weights = make_experts(1, 8, 4, torch.float32, torch.Generator().manual_seed(0))[0]
    slots = ExpertSlots()
    expert = LogicalExpert(1, 2)
    assert expert not in slots
    slots.load(expert, weights)
    assert expert in slots
    assert slots.held() == {expert}
    slots.unload(expert)
    assert expert not in slots
    assert slots.held() == frozenset()
    with pytest.raises(ExpertNotHeld):
        slots.unload(expert)


@pytest.mark.parametrize(("gate_up", "down"), [((8, 4), (4, 3)), ((7, 4), (4, 3)), ((8, 4), (5, 4)), ((8,), (4, 4)), ((8, 4), (4, 4, 1))])
def test_refuses_weights_that_do_not_fit_together(gate_up, down):
    with pytest.raises(ModelError, match="gate_up"):
        ExpertSlots([(LogicalExpert(0, 0), ExpertWeights(torch.zeros(gate_up), torch.zeros(down)))])


def test_refuses_an_expert_that_differs_from_its_layers_others():
    slots = hold(make_experts(2, 8, 4, torch.float32, torch.Generator().manual_seed(0)))
    for other in (ExpertWeights(torch.zeros(4, 8), torch.zeros(8, 2)), ExpertWeights(torch.zeros(8, 8).half(), torch.zeros(8, 4).half())):
        with pytest.raises(ModelError, match="as the layer's other experts are"):
            slots.load(LogicalExpert(LAYER, 2), other)
        slots.load(LogicalExpert(LAYER + 1, 2), other)
        slots.unload(LogicalExpert(LAYER + 1, 2))
    with pytest.raises(ModelError, match="not of one type"):
        slots.load(LogicalExpert(LAYER, 2), ExpertWeights(torch.zeros(8, 8), torch.zeros(8, 4).half()))


@pytest.mark.parametrize(
    ("hidden", "ids", "weights"),
    [
        ((3, 8), (2, 1), (2, 1)),
        ((2, 8), (2, 1), (2, 2)),
        ((2, 9), (2, 1), (2, 1)),
        ((2,), (2, 1), (2, 1)),
        ((2, 8), (2,), (2,)),
    ],
)
def test_refuses_a_batch_whose_shapes_do_not_fit(hidden, ids, weights):
    slots = hold(make_experts(1, 8, 4, torch.float32, torch.Generator().manual_seed(0)))
    with pytest.raises(ModelError, match="hidden"):
        slots.forward(LAYER, torch.zeros(hidden), torch.zeros(ids, dtype=torch.int64), torch.ones(weights))


def test_local_experts_answer_in_the_hidden_dtype():
    generator = torch.Generator().manual_seed(1)
    experts = make_experts(4, 16, 8, torch.float32, generator)
    ids, weights = make_choices(5, 4, 2, generator)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(5, 16, generator=generator).to(dtype)
        local = LocalExperts(hold(experts))
        combined = local.combine(local.dispatch(LAYER, hidden, Routing(ids, weights)))
        assert combined.dtype == dtype
        assert torch.equal(combined, hold(experts).forward(LAYER, hidden, ids, weights).to(dtype))


def test_serves_while_another_thread_loads_and_unloads():
    generator = torch.Generator().manual_seed(2)
    experts = make_experts(6, 16, 8, torch.float32, generator)
    slots = hold(experts)
    hidden = torch.randn(4, 16, generator=generator)
    ids, weights = make_choices(4, 4, 2, generator)
    expected = slots.forward(LAYER, hidden, ids, weights)
    changed, stop = threading.Event(), threading.Event()

    def churn():
        while not stop.is_set():
            for expert in (4, 5):
                slots.unload(LogicalExpert(LAYER, expert))
                slots.load(LogicalExpert(LAYER, expert), experts[expert])
            changed.set()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert changed.wait(10)
        answers = [slots.forward(LAYER, hidden, ids, weights) for _ in range(300)]
    finally:
        stop.set()
        thread.join(10)
    assert all(torch.equal(answer, expected) for answer in answers)
    assert len(slots.held()) == 6
