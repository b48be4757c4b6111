"""Recorded decode steps: bit for bit the plain ones, for every family, whatever the sizes, the threads and the order of passes."""

import random

import pytest
import torch

from model import cpu_add, cpu_threads, recorded_decode
from model.cpu_recording import NotRecordable, Recording
from tests.reference.local_generation import LocalGenerator, LocalSequence
from tests.tiny_models import TINY, VOCABULARY, write_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=TINY)
def generator(request, tmp_path_factory):
    return LocalGenerator.load(write_tiny(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(params=[1, 2])
def num_threads(request, monkeypatch):
    monkeypatch.setattr(cpu_threads, "num_shares_of", lambda _: request.param)
    monkeypatch.setattr(cpu_threads, "MIN_SHARE", 1)
    cpu_threads.allow(request.param)
    yield request.param
    cpu_threads._most.clear()


def sequences(number, seed=0):
    drawn = random.Random(seed)
    prompts = [[drawn.randrange(VOCABULARY) for _ in range(drawn.randrange(1, 40))] for _ in range(number)]
    return [LocalSequence(prompt, len(prompt)) for prompt in prompts]


def decode(generator, each, num_steps):
    """The logits of every step [steps, S, V], greedily continued; the prompts first."""
    logits = [found[-1] for found in generator.step([(one, len(one.token_ids)) for one in each])]
    steps = []
    for _ in range(num_steps):
        for one, found in zip(each, logits, strict=True):
            one.token_ids.append(int(found.argmax()))
        logits = [found[-1] for found in generator.step([(one, 1) for one in each])]
        steps.append(torch.stack(logits))
    for one in each:
        generator.free_pages += one.pages
    return torch.stack(steps)


def plainly(generator, *arguments):
    recorded, generator.model._recorded = generator.model._recorded, None
    try:
        return decode(generator, *arguments)
    finally:
        generator.model._recorded = recorded


def has_biases(generator):
    """A bias is added by torch: such a model is not recorded."""
    attention = generator.model.layers[0].attention
    linears = vars(getattr(attention, "weights", attention)).values()
    mlps = [getattr(layer.mlp, "shared", layer.mlp) for layer in generator.model.layers]
    gate_ups = [mlp.gate_up for mlp in mlps if mlp is not None]
    return any(getattr(each, "bias", None) is not None for each in (*linears, *gate_ups))


@pytest.mark.parametrize("number", [1, 2, 7])
def test_recorded_steps_are_bit_for_bit_the_plain_ones(generator, num_threads, number):
    found = decode(generator, sequences(number), 12)
    assert generator.model._recorded._is_possible != has_biases(generator)
    assert torch.equal(found, plainly(generator, sequences(number), 12))


def test_sizes_in_turns(generator):
    expected = {number: plainly(generator, sequences(number, seed=number), 6) for number in (1, 3)}
    for number in (3, 1, 3, 1):
        assert torch.equal(decode(generator, sequences(number, seed=number), 6), expected[number])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return LocalGenerator.load(write_tiny("v2-lite", tmp_path_factory.mktemp("one")))


def test_a_pass_that_fails_leaves_the_recording_to_the_next(one):
    expected = plainly(one, sequences(2, seed=3), 8)
    decode(one, sequences(2, seed=4), 6)

    class Failing:
        def dispatch(self, layer, hidden, routing):
            raise RuntimeError("no experts")

    each = sequences(2, seed=5)
    one.step([(mine, len(mine.token_ids)) for mine in each])
    experts, one.experts = one.experts, Failing()
    for mine in each:
        mine.token_ids.append(1)
    with pytest.raises(RuntimeError, match="no experts"):
        one.step([(mine, 1) for mine in each])
    one.experts = experts
    recorded = one.model._recorded
    assert len(recorded._free) > 0
    assert torch.equal(decode(one, sequences(2, seed=3), 8), expected)


def test_two_passes_of_one_size_at_once_have_a_recording_each(one, monkeypatch):
    decode(one, sequences(2, seed=6), 6)
    recorded = one.model._recorded
    taken = []
    take = recorded._take
    monkeypatch.setattr(recorded, "_take", lambda size: taken.append(take(size)) or taken[-1])

    class Nested:
        """Runs another pass of the same size while the outer one waits for its experts."""

        def __init__(self):
            self.is_nested = False
            self.inner = None

        def dispatch(self, layer, hidden, routing):
            if not self.is_nested:
                self.is_nested = True
                one.experts = experts
                self.inner = decode(one, sequences(2, seed=7), 3)
                one.experts = self
            return experts.dispatch(layer, hidden, routing)

        def combine(self, handle):
            return experts.combine(handle)

    expected_inner, expected_outer = plainly(one, sequences(2, seed=7), 3), plainly(one, sequences(2, seed=8), 4)
    experts = one.experts
    each = sequences(2, seed=8)
    logits = [found[-1] for found in one.step([(mine, len(mine.token_ids)) for mine in each])]
    steps = []
    for _ in range(4):
        for mine, found in zip(each, logits, strict=True):
            mine.token_ids.append(int(found.argmax()))
        one.experts = nested = Nested()
        logits = [found[-1] for found in one.step([(mine, 1) for mine in each])]
        one.experts = experts
        steps.append(torch.stack(logits))
        assert torch.equal(nested.inner, expected_inner)
    assert torch.equal(torch.stack(steps), expected_outer)
    assert any(step is not None for step in taken)


def test_recordings_are_bounded_and_a_new_cache_begins_anew(one, monkeypatch):
    monkeypatch.setattr(recorded_decode, "_MAX_BYTES", 1 << 16)
    for number in range(1, 6):
        decode(one, sequences(number, seed=number), 6)
    recorded = one.model._recorded
    assert recorded._num_bytes <= 1 << 16
    expected = plainly(one, sequences(2), 5)
    other = LocalGenerator(one.model, one.experts)
    for mine, theirs in zip(one.cache.layers, other.cache.layers, strict=True):
        assert mine[0].data_ptr() != theirs[0].data_ptr()
    assert torch.equal(decode(other, sequences(2), 5), expected)


def test_what_is_no_job_cannot_be_recorded():
    x = torch.ones(4, 6)
    for compute in (lambda: x * 2, lambda: x.t().contiguous(), lambda: x[:, :3].flatten(), lambda: torch.zeros(3), lambda: x.add_(1)):
        with pytest.raises(NotRecordable), Recording().recording():
            compute()


def test_a_recording_does_its_calls_again_with_what_is_there_then():
    x, y = torch.zeros(3, 700), torch.zeros(3, 700)
    recording = Recording()
    with recording.recording():
        total = cpu_add.add(cpu_add.add(x, y), y)
    for value in (1.0, 2.0):
        x.fill_(value)
        y.fill_(3.0)
        recording.replay()
        assert (total == value + 6).all()
    assert recording.num_bytes == 2 * total.nbytes
    assert torch.equal(cpu_add.add(x, y), x + y)
