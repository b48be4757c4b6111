"""A short part of the trace replay: the figures that the whole of it must show."""

import pytest

from cluster.placement import prepare
from router import replica_choice
from tests.benchmarks.placement_replay import replay, sides, windows
from tests.shared_data import shared_data

NUM_LAYERS, NUM_WINDOWS = 13, 6


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    prepare()
    replica_choice.prepare()


@pytest.mark.parametrize("trace", ["law", "translation"])
@pytest.mark.parametrize(("num_slots", "least"), [(72, 0.95), (80, 0.985)])
def test_real_traffic(trace: str, num_slots: int, least: float):
    shared_data("expert_traces")
    traffic = windows([trace], NUM_LAYERS, NUM_WINDOWS)
    scores = {name: replay(traffic, *side) for name, side in sides(num_slots, NUM_LAYERS).items()}
    balancedness, *_, moved_gb = scores["Shoal plan, replica choice by tokens"].row()
    assert balancedness >= least
    assert moved_gb < 0.25
    _, at_64, at_512, _ = scores["Shoal plan, replica choice by cost"].row()
    _, even_at_64, even_at_512, _ = scores["EPLB plan, even split"].row()
    _, level_at_64, level_at_512, _ = scores["EPLB plan, water-filling"].row()
    assert at_64 < level_at_64
    assert at_64 <= (0.85 if num_slots == 80 else 0.95) * even_at_64
    assert at_512 <= min(even_at_512, level_at_512)
