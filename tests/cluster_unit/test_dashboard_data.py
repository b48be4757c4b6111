"""What the dashboard polls, from views made up and from a real Coordinator's."""

import json

import pytest

from cluster.config import DashboardSettings
from cluster.coordinator import Coordinator
from cluster.coordinator_limits import CoordinatorLimits
from cluster.dashboard.data import Known, dashboard_data, known_of
from cluster.dashboard.events import events_after
from cluster.dashboard.latency import latencies
from cluster.metrics.application_metrics import ApplicationMetrics
from cluster.metrics.request_metrics import RequestMetrics
from cluster.placement import PlannerSettings
from model.logical_expert import LogicalExpert
from tests.cluster_unit.front_door import VIEW
from tests.cluster_unit.made_up_members import Clock, Host, Router
from tests.cluster_unit.made_up_views import MadeUpCluster

FREE = DashboardSettings()


def data_of(view, settings=FREE, known=None):
    return dashboard_data(view, settings, "tiny", 1e9, known or Known())


def test_rates_and_holders_stand_by_layer_and_expert():
    data = data_of(VIEW)
    assert data["experts"] == {"layers": [1], "num_experts": 2, "tokens_per_s": [[1.0, 3.0]], "window_s": 60.0}
    assert data["placement"] == {"hosts": ["host-a", "host-b"], "holders": [[[0], [0, 1]]]}
    assert data["map_version"] == "3.7"
    assert data["num_standalone"] == 1


def test_layers_are_in_the_order_of_their_numbers_and_gaps_are_filled():
    placement = {"version": None, "layers": {"10": {"1": []}, "2": {"0": ["host-a"]}}}
    load = VIEW["load"] | {"tokens_per_s": {"10": {"3": 5.0}}, "expert_tokens": {}}
    data = data_of(VIEW | {"placement": placement, "load": load})
    assert data["experts"]["layers"] == [2, 10]
    assert data["experts"]["tokens_per_s"] == [[0], [0, 0, 0, 5.0]]
    assert data["placement"]["holders"] == [[[0]], [[], [], [], []]]
    assert data["map_version"] == ""


def test_latencies_are_histograms_of_everything_that_gateways_counted():
    metrics = ApplicationMetrics("tiny", 5.0)
    gateways = RequestMetrics(), RequestMetrics()
    for index, gateway in enumerate(gateways):
        gateway.first_token(0.07)
        gateway.token_gap(1e9)
        metrics.hear(index, gateway.sums())
    shown = data_of(VIEW | {"latency": latencies(metrics.totals)})["latency"]
    first, gaps = shown["time_to_first_token"], shown["inter_token"]
    (slot,) = [index for index, count in enumerate(first["counts"]) if count]
    assert first["counts"][slot] == 2
    assert first["bounds_s"][slot - 1] < 0.07 <= first["bounds_s"][slot]
    assert gaps["counts"] == [0] * len(gaps["bounds_s"]) + [2]


def test_hosts_have_a_word_for_their_state():
    states = {host["id"]: host["state"] for host in data_of(VIEW)["hosts"]}
    assert states == {"host-a": "ready", "host-b": "draining"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"price_per_host_hour": 2.0}, 2 * 2.0 + 2.0),
        ({"price_per_host_hour": 2.0, "price_per_router_hour": 0.5}, 2 * 2.0 + 0.5),
        ({"price_per_router_hour": 0.5}, None),
    ],
)
def test_price_is_of_all_hosts_and_routers_and_absent_without_one(settings, expected):
    assert data_of(VIEW, DashboardSettings(**settings))["price_per_hour"] == expected


def test_what_the_page_knows_is_left_out():
    known = Known(epoch=3, map_version="3.7", event=2)
    data = data_of(VIEW, known=known)
    assert data["placement"] is None
    assert data["events"] == []


def test_another_coordinator_tells_everything():
    data = data_of(VIEW, known=Known(epoch=2, map_version="3.7", event=2))
    assert data["placement"] is not None
    assert [event["n"] for event in data["events"]] == [2]


def test_a_log_that_has_begun_anew_is_told_whole():
    assert [event["n"] for event in events_after(VIEW["decisions"], 40)] == [2]


@pytest.mark.parametrize("query", [("3", "3.7", "x"), (None, None, None), ("-1", "", "0"), ("9" * 40, "", "0"), ("²", "", "1")])
def test_a_query_that_makes_no_sense_knows_nothing(query):
    assert known_of(*query) == Known()


def test_a_query_is_what_the_last_answer_said():
    assert known_of("3", "3.7", "2") == Known(3, "3.7", 2)


def test_a_large_model_is_one_small_answer():
    view = MadeUpCluster(60, 256, 64).view(10.0)
    assert len(json.dumps(data_of(view), separators=(",", ":"))) < 400_000
    known = Known(3, "3.7", 0)
    assert len(json.dumps(data_of(view, known=known), separators=(",", ":"))) < 200_000


def test_a_coordinators_own_sentences_stand_in_their_lanes():
    clock = Clock()
    experts = [LogicalExpert(1, expert) for expert in range(4)]
    limits = CoordinatorLimits(num_hosts=3, num_routers=1, planner=PlannerSettings(min_replicas=2))
    coordinator = Coordinator(experts, limits, clock, wall_clock=clock)
    hosts, router = [Host("a"), Host("b"), Host("c")], Router()
    for _ in range(4):
        for member in (*hosts, router):
            member.exchange(coordinator)
        clock.now += 1
    drained = coordinator.drain("a")
    for _ in range(4):
        for member in (*hosts, router):
            member.exchange(coordinator)
        clock.now += 1
    assert not coordinator.operation(drained.id).is_open
    for _ in range(int(limits.lease_s) + 2):  # a is silent
        for member in hosts[1:]:
            member.exchange(coordinator)
        router.exchange(coordinator)
        clock.now += 1
    data = data_of(coordinator.view())
    told = {(event["lane"], event["tone"]): event["text"] for event in data["events"]}
    assert "joined" in told["members", "good"]
    assert "lease ended" in told["trouble", "bad"]
    assert "published map" in told["placement", "plain"]
    assert "drains host a" in told["operations", "plain"]
    assert "done" in told["operations", "good"]
    assert all(event["kind"] != "stay" for event in data["events"])
