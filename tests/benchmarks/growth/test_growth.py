"""The laws against figures known from elsewhere, the models against the laws' sizes, and the picture against what it is given."""

import re
from itertools import pairwise

import pytest
import torch

from model.experts import LocalExperts
from tests.benchmarks.growth.decoding import Decoding
from tests.benchmarks.growth.hosts import HostsPoint, busiest_choices
from tests.benchmarks.growth.laws import Machine, activated_experts, fit_line, hosts_law, step_bytes, step_law
from tests.benchmarks.growth.model import PoolSource, build_model, model_config, sizes_of
from tests.benchmarks.growth.picture import Curve, Panel, draw, nice_ticks
from tests.benchmarks.growth.report import hosts_sentence, sweep_text
from tests.benchmarks.growth.sweeps import SWEEPS, Knobs, Measured, judge, quieter

SLOW = Machine(bytes_per_s=1.0, operations_per_s=1e30)
WEAK = Machine(bytes_per_s=1e30, operations_per_s=1.0)


@pytest.mark.parametrize(("batch", "megabytes"), [(1, 285), (8, 780), (32, 1240)])
def test_a_float32_step_of_the_benchmark_model_reads_what_its_issue_says(batch, megabytes):
    read = step_bytes(sizes_of(model_config(), torch.float32), batch, context=1)
    assert read / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_activated_experts_are_those_that_some_token_chose():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(8, 64, generator=generator).topk(6).indices.unique().numel() for _ in range(400)]
    assert activated_experts(64, 6, 8) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)
    assert activated_experts(64, 6, 1) == pytest.approx(6)
    assert activated_experts(8, 2, 10_000) == pytest.approx(8)


def test_a_step_takes_the_longer_of_reading_and_computing():
    sizes = sizes_of(model_config())
    read, computed = step_law(SLOW, sizes, 8, 64), step_law(WEAK, sizes, 8, 64)
    assert read.total_s == pytest.approx(step_bytes(sizes, 8, 64))
    assert computed.dense_s == 2 * 8 * sizes.dense_parameters
    assert computed.experts_s == 2 * 8 * 6 * 11 * 3 * 512 * 256
    assert computed.attention_s == 8 * 64 * 12 * 4 * 2 * (576 + 512)
    both = step_law(Machine(1.0, computed.dense_s / read.dense_s / 2), sizes, 8, 64)
    assert both.dense_s == pytest.approx(2 * read.dense_s)


def test_twice_the_layers_are_twice_the_experts_and_latents():
    few, many = (sizes_of(model_config(layers)) for layers in (5, 9))
    assert (few.num_moe_layers, many.num_moe_layers) == (4, 8)
    assert many.latent_bytes / few.latent_bytes == many.context_operations / few.context_operations == 9 / 5
    assert sizes_of(model_config(experts=8)).top_k == 2


def test_metered_hosts_wait_for_the_busiest_alone():
    choices = [torch.tensor([[0, 1], [0, 63]]), torch.tensor([[40, 41], [42, 0]])]
    assert busiest_choices(choices, 2, 64) == 3
    assert busiest_choices(choices, 1, 64) == 4
    assert hosts_law(0.5, 4, 0.001, 3) == pytest.approx(0.512)


def test_a_line_through_points_of_a_line_is_that_line():
    line = fit_line([1, 2, 50], [5, 7, 103])
    assert (line.constant, line.slope) == pytest.approx((3, 2))


def test_the_pools_tensors_share_no_memory_and_do_not_begin_alike():
    source = PoolSource(torch.float32)
    first, second = (source.take("model.layers.0.mlp.gate.weight", (64, 512)) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert not torch.equal(first[0], second[0])
    assert first.std() == pytest.approx(512**-0.5, rel=0.1)


def test_sequences_decode_at_the_context_asked_for_without_a_prefill():
    built = build_model(model_config(2, 8, is_hollow=True), num_threads=1)
    decoding = Decoding(built.model, LocalExperts(built.slots), batch=3, context=100)
    times = decoding.time(budget_s=0.0)
    assert decoding._engine.load.num_steps == times.num_steps
    assert decoding._engine.load.num_generated_tokens == 3 * times.num_steps
    lengths = {sequence.num_tokens for sequence in decoding._engine._sequences.values()}
    assert lengths == {100 - 4 - 16 + times.num_steps}
    assert 0 < times.experts_s < times.step_s
    assert all(ids.shape == (3, 2) for ids in decoding.choices())


def test_ticks_cover_what_is_drawn():
    ticks = nice_ticks(3.9, 342.4)
    assert ticks == pytest.approx([2, 5, 10, 20, 50, 100, 200, 500])
    assert nice_ticks(10, 100) == pytest.approx([10, 20, 50, 100])


def test_a_law_that_doubles_with_its_axis_is_a_straight_line_inside_the_panel(tmp_path):
    curve = Curve("law", "#000000", (1.0, 2.0, 4.0, 8.0))
    draw([Panel("a < b", "note", (1, 2, 4, 8), (curve,))], tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "a &lt; b" in text
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'polyline points="([^"]+)"', text)[1].split()]
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=0.01)
    assert all(0 <= x <= 300 and 0 <= y <= 190 for x, y in points)


def test_the_sentence_names_the_worst_point_and_where_the_law_is_left():
    sizes, machine = sizes_of(model_config()), Machine(30e9, 150e9)
    points = []
    for batch, factor in ((1, 1.0), (2, 1.0), (4, 3.0)):
        law = step_law(machine, sizes, batch, 64)
        points.append(judge(machine, Measured(batch, Knobs(batch), sizes, law.total_s * factor, law.experts_s, 0.0, law.activated, 1e4)))
    text = sweep_text(SWEEPS[0], points)
    assert "furthest at 4 (3.00)" in text
    assert "between 2 and 4 sequences (x 3.00)" in text
    assert "page faults 10000 become 10000" in text
    assert text.count("\n| ") == 5


def test_of_two_passes_the_undisturbed_counts():
    sizes = sizes_of(model_config())
    slow, fast = (Measured(8, Knobs(), sizes, step_s, step_s / 2, 0.01 / step_s, 30.0, 0.0) for step_s in (0.2, 0.1))
    assert quieter(slow, fast) == quieter(fast, slow)
    assert quieter(slow, fast).step_s == 0.1
    assert quieter(slow, fast).calls_s == pytest.approx(0.05)


def test_the_hosts_sentence_gives_what_a_host_adds_to_a_hop():
    points = [HostsPoint(32, hosts, 0.02, 0.010 + hosts * 0.0004, 0.0, 0.0, 24.0, 24.0) for hosts in (1, 2, 4, 8)]
    assert "each host more makes a layer 100 us longer" in hosts_sentence(points, 0.0)
