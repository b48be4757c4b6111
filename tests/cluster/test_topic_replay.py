"""Replicas follow a load that turns from one topic to another, and no stream notices.

The expert traces as routing, on metered hosts (`tests.cluster.topic_replay`); `python -m tests.benchmarks.topics` measures it.
"""

import time

import pytest

from tests.cluster.conftest import Shoals
from tests.cluster.topic_replay import (
    FIRST,
    MOVING,
    NUM_EXPERTS,
    NUM_LAYERS,
    SECOND,
    SETTINGS,
    Loops,
    hottest,
    num_replicas,
    place,
    topic_actors,
    turn_to,
    wait_until_converged,
    write_topic_checkpoint,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SETTLE_S = 4.0
MORE_REPLICAS = 3  # of 54 hot ones: each run of the benchmark gains as many within 25 s, most 12


def test_replicas_follow_the_topic_and_no_stream_fails(shoals: Shoals, tmp_path, record_property):
    checkpoint = write_topic_checkpoint(tmp_path)
    hot = hottest(SECOND)
    with topic_actors(), shoals.running(checkpoint, "topics", **SETTINGS, **MOVING) as app, Loops(app) as loops:
        turn_to(checkpoint, FIRST)
        time.sleep(SETTLE_S)
        place(app, FIRST)
        before = app.view()
        replicas_before = num_replicas(before, hot)
        turn_to(checkpoint, SECOND)
        turned_s = time.monotonic()
        while num_replicas(after := app.view(), hot) < replicas_before + MORE_REPLICAS:
            assert time.monotonic() < turned_s + 60, after["decisions"][-20:]
            time.sleep(0.5)
        wait_until_converged(app)
        enough = loops.num_tokens + 100  # under the last map too
        while loops.num_tokens < enough and not loops.problems:
            assert time.monotonic() < turned_s + 90
            time.sleep(0.1)
        layers = app.view()["placement"]["layers"]
        gap_s = loops.longest_gap_s(turned_s)
    assert not loops.problems
    assert after["placement"]["version"] > before["placement"]["version"]
    assert len(layers) == NUM_LAYERS
    assert all(len(hosts) == NUM_EXPERTS and all(hosts.values()) for hosts in layers.values())
    moves = sum(line["num_moves"] for line in after["decisions"] if line["kind"] == "plan" and line["n"] > before["decisions"][-1]["n"])
    text = f"{moves} replicas moved, the hottest {len(hot)} have {num_replicas(after, hot)} instead of {replicas_before}"
    print(text, f"(longest gap {gap_s:.2f} s)")
    record_property("topics", text)
