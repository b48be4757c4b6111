"""The simulation, on a small piece of the trace: it conserves requests, obeys bounds, and is slow where capacity says it must be."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.autoscaling import Bounds
from tests.benchmarks.elasticity.__main__ import TRACE, prepare
from tests.benchmarks.elasticity.constants import Constants, Replay
from tests.benchmarks.elasticity.fleet import Replay as FleetReplay
from tests.benchmarks.elasticity.fleet import Shape, router_costs
from tests.benchmarks.elasticity.hosts import ExpertHosts, read_traces
from tests.benchmarks.elasticity.picture import draw
from tests.benchmarks.elasticity.requests import Requests, read_requests, share_after_silence
from tests.benchmarks.elasticity.search import Found
from tests.shared_data import shared_data

CONSTANTS = replace(Constants(), replay=Replay(stretch=4.0, copies=4))


@pytest.fixture(scope="module")
def hosts():
    return ExpertHosts(CONSTANTS, read_traces(shared_data("expert_traces")))


@pytest.fixture(scope="module")
def requests():
    return read_requests(shared_data(TRACE), CONSTANTS.replay, first=300)


def play(hosts, requests, shape, constants=CONSTANTS):
    return FleetReplay(constants, hosts, requests, shape).run()


def fixed(routers, hosts):
    return Shape(Bounds(routers, routers), Bounds(hosts, hosts))


def test_the_replay_keeps_the_traces_rate_and_lengths(requests):
    assert len(requests.arrival_s) == 4 * 300
    assert (np.diff(requests.arrival_s) >= 0).all()
    assert requests.prompt[0] in (4808, 3180, 110)


def test_minutes_played_again_come_after_one_another():
    whole = read_requests(shared_data(TRACE), Replay(stretch=1.0, copies=1))
    twice = read_requests(shared_data(TRACE), Replay(stretch=1.0, copies=1, plays=2))
    per_minute = np.bincount((whole.arrival_s // 60).astype(int), minlength=60)
    assert (np.bincount((twice.arrival_s // 60).astype(int), minlength=120) == np.repeat(per_minute, 2)).all()


def test_requests_after_silence_are_those_near_the_first_one():
    arrival_s = np.array([0.0, 3.0, 9.0, 30.0, 31.0, 70.0])
    assert share_after_silence(arrival_s, silence_s=10.0, within_s=5.0) == 5 / 6
    assert share_after_silence(arrival_s, silence_s=100.0, within_s=5.0) == 2 / 6


def test_one_request_alone_takes_what_its_steps_cost(hosts):
    one = Requests(np.array([10.0]), np.array([512]), np.array([1]), 60.0)
    costs, frame = router_costs(CONSTANTS), hosts.cost(4, "law", "law")
    own_s = costs.step_s + 512 * costs.token_s + 0.5 * 512**2 * costs.pair_s
    outcome = play(hosts, one, fixed(1, 4))
    assert outcome.ttft_p99_s == pytest.approx(costs.front_s + own_s + frame.busiest_s[512])


def test_every_request_is_served_whoever_scales(hosts, requests):
    for shape in (fixed(8, 12), Shape(Bounds(2, 8), Bounds(3, 12)), Shape(Bounds(2, 8), Bounds(4, 16), unit=(1, 2))):
        outcome = play(hosts, requests, shape)
        assert outcome.num_served == outcome.num_requests == 1200
        for column, bounds in ((3, shape.routers), (4, shape.hosts)):
            assert bounds.min <= outcome.counts[:, column].min() <= outcome.counts[:, column].max() <= bounds.max


def test_more_hosts_make_the_first_token_sooner_and_a_fixed_fleet_costs_its_nodes(hosts, requests):
    few, many = (play(hosts, requests, fixed(8, count)) for count in (3, 24))
    assert few.ttft_p99_s > many.ttft_p99_s
    assert many.hours == pytest.approx(32 * np.ceil(requests.span_s / 60) / 60)


def test_hosts_cannot_do_more_than_their_time(hosts, requests):
    """However many routers push, tokens a second stay under what the hosts' work allows."""
    burst = Requests(np.zeros(400), np.full(400, 2048), np.full(400, 1), 60.0)
    outcome = play(hosts, burst, fixed(32, 3))
    work_s = 400 * 2048 / 512 * hosts.cost(3, "law", "law").mean_s[512]
    assert outcome.ttft_p99_s > 0.9 * work_s


def test_a_slower_node_start_makes_the_first_tokens_of_a_burst_later(hosts, requests):
    slow = replace(CONSTANTS, cluster=replace(CONSTANTS.cluster, node_start_s=300.0))
    shape = Shape(Bounds(1, 16), Bounds(3, 24))
    assert play(hosts, requests, shape, slow).ttft_p99_s > play(hosts, requests, shape).ttft_p99_s


def test_the_search_finds_fleets_that_meet_the_targets_and_draws_them(tmp_path):
    lines: list[str] = []
    requests, search = prepare(CONSTANTS, lines.append, first=150)
    found = search.fixed(most=32)
    assert found.outcome.is_met
    routers, hosts = found.shape.routers.min, found.shape.hosts.min
    assert not any(search.play(fixed(*smaller)).is_met for smaller in ((routers, hosts - 1), (routers - 1, hosts)))
    elastic = search.elastic(found.shape)
    assert elastic.outcome.is_met
    assert lines
    draw(requests, Found(found.shape, found.outcome), elastic, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().count("<polygon") == 5
