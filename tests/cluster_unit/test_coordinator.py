"""The control loop with made-up members and a made-up clock."""

from dataclasses import replace

import pytest

from actors.exchange import HostReport, RouterReport
from cluster.coordinator import Coordinator, CoordinatorLimits
from model.logical_expert import LogicalExpert
from router.placement_map import Endpoint, HostKey, MapVersion

EXPERTS = [LogicalExpert(layer, expert) for layer in (1, 2) for expert in range(8)]
LIMITS = CoordinatorLimits(num_hosts=2, num_routers=1, lease_s=5.0, orphan_grace_s=20.0)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Host:
    """A host that loads what it is told at once and reports it at its next call."""

    def __init__(self, name, slots=None):
        self.key = HostKey(name, 1)
        self.report = HostReport(self.key, Endpoint("node", name, "127.0.0.1", 1), 0, frozenset(), slots=slots)

    def exchange(self, coordinator):
        self.report = replace(self.report, number=self.report.number + 1)
        orders = coordinator.exchange_host(self.report)
        self.report = replace(self.report, ready=(self.report.ready & orders.keep) | orders.desired)
        return orders


class Router:
    def __init__(self, name="r", adopted=None):
        self.report = RouterReport(HostKey(name, 1), Endpoint("node", name, "127.0.0.1", 1), 0, adopted)

    def exchange(self, coordinator, *, adopt=True):
        self.report = replace(self.report, number=self.report.number + 1)
        orders = coordinator.exchange_router(self.report)
        if orders.map is not None and adopt:
            self.report = replace(self.report, adopted=orders.map.version)
        return orders.map


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def coordinator(clock):
    return Coordinator(EXPERTS, LIMITS, clock)


def started(coordinator):
    """Two hosts and a router that have agreed on the first map."""
    hosts, router = [Host("a"), Host("b")], Router()
    for _ in range(3):
        for member in (*hosts, router):
            member.exchange(coordinator)
    return hosts, router


def test_publishes_only_when_every_expert_is_ready(coordinator):
    a, b, router = Host("a"), Host("b"), Router()
    a.exchange(coordinator)
    b.exchange(coordinator)
    assert router.exchange(coordinator) is None  # everyone is here; planned, nothing loaded
    a.exchange(coordinator)
    a.exchange(coordinator)
    assert router.exchange(coordinator) is None  # half of the experts are ready
    b.exchange(coordinator)
    b.exchange(coordinator)
    published = router.exchange(coordinator)
    assert set(published.expert_to_hosts) == set(EXPERTS)
    assert {len(hosts) for hosts in published.expert_to_hosts.values()} == {1}
    assert {key: len(held) for key, held in published.host_to_experts.items()} == {a.key: 8, b.key: 8}


def test_gateways_see_routers_that_adopted_a_map(coordinator):
    _hosts, router = started(coordinator)
    assert [entry.key for entry in coordinator.registry().routers] == []  # its report is older than its adoption
    assert not coordinator.registry().is_complete
    router.exchange(coordinator)
    assert [entry.key for entry in coordinator.registry().routers] == [router.report.key]
    assert coordinator.registry().is_complete


def test_a_lost_host_is_replaced_by_the_newcomer(coordinator, clock):
    (a, b), router = started(coordinator)
    version = router.report.adopted
    clock.now += LIMITS.lease_s + 1  # b is killed; Serve starts c
    a.exchange(coordinator)
    c = Host("c")
    for _ in range(2):
        c.exchange(coordinator)
        a.exchange(coordinator)
    c.exchange(coordinator)
    published = router.exchange(coordinator)
    assert published.version > version
    assert published.host_to_experts[c.key] == b.report.ready
    assert published.host_to_experts[a.key] == a.report.ready


def test_the_other_hosts_take_over_after_the_grace(coordinator, clock):
    (a, _b), router = started(coordinator)
    for _ in range(30):
        clock.now += 1
        a.exchange(coordinator)
        router.exchange(coordinator)
    assert a.report.ready == frozenset(EXPERTS)
    assert router.exchange(coordinator) is None  # adopted already
    assert router.report.adopted.n == 2


def test_a_host_keeps_what_a_router_may_still_ask_for(coordinator, clock):
    (a, b), router = started(coordinator)
    router.exchange(coordinator)
    clock.now += LIMITS.lease_s + 1
    router.report = replace(router.report, adopted=MapVersion(1, 1))
    a.exchange(coordinator)
    router.exchange(coordinator, adopt=False)
    orders = a.exchange(coordinator)
    assert a.report.ready <= orders.keep
    assert not b.report.ready & orders.keep


def test_a_new_coordinator_outranks_the_map_it_hears_of(clock):
    old = MapVersion(4, 17)
    a, b, router = Host("a"), Host("b"), Router(adopted=old)
    held = {a: frozenset(EXPERTS[:8]), b: frozenset(EXPERTS[8:])}
    for host, experts in held.items():
        host.report = replace(host.report, ready=experts)
    coordinator = Coordinator(EXPERTS, LIMITS, clock)
    router.exchange(coordinator)
    for _ in range(8):
        clock.now += 1
        a.exchange(coordinator)
        b.exchange(coordinator)
        router.exchange(coordinator)
    assert router.report.adopted > old
    assert {host: host.report.ready for host in (a, b)} == held  # nothing moved: reports are the map's memory


def test_for_a_lease_a_new_coordinator_lets_hosts_keep_what_routers_it_has_not_heard_of_may_name(clock):
    a = Host("a")
    a.report = replace(a.report, ready=frozenset(EXPERTS))
    coordinator = Coordinator(EXPERTS, CoordinatorLimits(num_hosts=2, num_routers=1), clock)
    b = Host("b")
    b.report = replace(b.report, ready=frozenset(EXPERTS[:3]))  # from an earlier map
    for _ in range(4):
        clock.now += 1
        a.exchange(coordinator)
        assert b.exchange(coordinator).keep >= frozenset(EXPERTS[:3])


def test_a_report_that_was_overtaken_changes_nothing(coordinator):
    (a, b), router = started(coordinator)
    late = replace(a.report, number=0, ready=frozenset())
    coordinator.exchange_host(late)
    assert coordinator.view()["num_ready"] == 16
    a.exchange(coordinator)
    b.exchange(coordinator)
    assert router.exchange(coordinator) is None, "no new map"


def test_tokens_are_counted_over_all_reports(coordinator):
    _hosts, router = started(coordinator)
    for _ in range(3):
        router.report = replace(router.report, expert_tokens={EXPERTS[3]: 5})
        router.exchange(coordinator)
    assert coordinator.view()["load"]["expert_tokens"] == {"1": {"3": 15}}


def test_nothing_is_planned_in_the_first_lease_while_somebody_is_missing(coordinator, clock):
    a = Host("a")
    a.exchange(coordinator)
    clock.now += LIMITS.lease_s - 1
    assert a.exchange(coordinator).desired == frozenset()


def test_too_few_slots_is_said(coordinator):
    hosts, router = [Host("a", slots=4), Host("b", slots=4)], Router()
    for member in (*hosts, router, *hosts):
        member.exchange(coordinator)
    assert "slots" in coordinator.registry().failure


def test_a_host_that_cannot_load_is_said(coordinator):
    hosts, router = started(coordinator)
    hosts[0].report = replace(hosts[0].report, failure="expert 3 of layer 1 cannot be loaded")
    hosts[0].exchange(coordinator)
    assert coordinator.registry().failure == "host a: expert 3 of layer 1 cannot be loaded"
    assert "host a: expert 3 of layer 1 cannot be loaded" in coordinator.view()["events"][-1]["text"]
    assert router.report.adopted == MapVersion(1, 1)


def test_a_dense_model_has_an_empty_map_at_once(clock):
    router = Router()
    published = router.exchange(Coordinator([], CoordinatorLimits(0, 1), clock))
    assert published.expert_to_hosts == {}


def test_the_view_is_plain(coordinator):
    import json

    started(coordinator)
    view = json.loads(json.dumps(coordinator.view()))
    assert view["num_ready"] == view["num_experts"] == 16
    assert len(view["placement"]["layers"]["1"]) == 8
    assert any("published map 1.1" in event["text"] for event in view["events"])
