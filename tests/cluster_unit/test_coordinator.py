"""The control loop with made-up members and a made-up clock."""

import json
from dataclasses import replace

import pytest

from cluster.coordinator import Coordinator, Outranked
from cluster.coordinator_limits import CoordinatorLimits
from cluster.operations import BadBounds, UnknownHost, UnknownOperation
from cluster.placement import PlannerSettings
from cluster.state_store import MemoryStore
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion
from tests.cluster_unit.made_up_members import Clock, Host, Router

EXPERTS = [LogicalExpert(layer, expert) for layer in (1, 2) for expert in range(8)]
LIMITS = CoordinatorLimits(num_hosts=2, num_routers=1, lease_s=5.0, orphan_grace_s=20.0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def coordinator(clock):
    return new_coordinator(clock)


def new_coordinator(clock, limits=LIMITS, **fields):
    return Coordinator(EXPERTS, limits, clock, wall_clock=lambda: 1e9 + clock.now, **fields)


def rounds(coordinator, clock, members, num=4, step_s=1.0):
    """Time passes, and every member reports each second of it."""
    for _ in range(num):
        for member in members:
            member.exchange(coordinator)
        clock.now += step_s


def started(coordinator, clock, num_hosts=2, num_routers=1, **fields):
    """Hosts and routers that have agreed on the first map."""
    hosts = [Host(name, **fields) for name in "abcdef"[:num_hosts]]
    routers = [Router(f"r{number}") for number in range(num_routers)]
    rounds(coordinator, clock, [*hosts, *routers], 5)
    assert coordinator.maps.current is not None
    return (*hosts, *routers)


def published(coordinator):
    return coordinator.maps.current.expert_to_hosts


def texts(coordinator, kind):
    return [line["text"] for line in coordinator.view()["decisions"] if line["kind"] == kind]


# -- desired, ready, published


def test_publishes_only_when_every_expert_is_ready(coordinator):
    a, b, router = Host("a"), Host("b"), Router()
    for _ in range(2):  # everyone is here, and has seen the epoch: planned, nothing reported yet
        for member in (a, b, router):
            assert not member.exchange(coordinator) or member is not router
    a.exchange(coordinator)
    a.exchange(coordinator)
    assert router.exchange(coordinator) is None  # half of the experts are ready
    b.exchange(coordinator)
    b.exchange(coordinator)
    first = router.exchange(coordinator)
    assert set(first.expert_to_hosts) == set(EXPERTS)
    assert {len(hosts) for hosts in first.expert_to_hosts.values()} == {1}
    assert {key: len(held) for key, held in first.host_to_experts.items()} == {a.key: 8, b.key: 8}


def test_maps_wait_for_more_to_be_ready_unless_something_is_amiss(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, publish_interval_s=1.0, planner=PlannerSettings(min_replicas=2)))
    _a, b, router = started(coordinator, clock)
    c = Host("c")
    c.duties.obey(coordinator.exchange_host(c.make_report()), c.ready)
    coordinator.drain("a")
    orders = coordinator.exchange_host(c.make_report())
    first = coordinator.maps.current.version
    clock.now += 1.0
    some, rest = sorted(orders.desired)[:4], sorted(orders.desired)[4:]
    for ready in (some[:2], some):
        c.report = replace(c.report, ready=frozenset(ready))
        coordinator.exchange_host(c.make_report())
        clock.now += 0.1
    assert coordinator.maps.current.version.n == first.n + 1, "the first piece has waited for long enough, the next one waits"
    clock.now += 1.0
    coordinator.observe()
    assert coordinator.maps.current.version.n == first.n + 2
    c.report = replace(c.report, ready=frozenset([*some, rest[0]]))
    coordinator.exchange_host(c.make_report())
    assert coordinator.maps.current.version.n == first.n + 2
    router.exchange(coordinator, suspects=(b.key,))
    assert coordinator.maps.current.version.n == first.n + 3, "a host that cannot be reached: at once"
    router.exchange(coordinator, suspects=())
    c.report = replace(c.report, ready=orders.desired)
    coordinator.exchange_host(c.make_report())
    assert coordinator.maps.current.version.n == first.n + 4, "all is ready: at once"


def test_gateways_see_routers_that_adopted_a_map(coordinator):
    a, b, router = Host("a"), Host("b"), Router()
    while router.report.adopted is None:
        for member in (a, b, router):
            member.exchange(coordinator)
    assert [entry.key for entry in coordinator.registry().routers] == []  # its report is older than its adoption
    assert not coordinator.registry().is_complete
    router.exchange(coordinator)
    assert [entry.key for entry in coordinator.registry().routers] == [router.key]
    assert coordinator.registry().is_complete


def test_min_replicas_are_held_and_published(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, num_hosts=3, planner=PlannerSettings(min_replicas=2)))
    started(coordinator, clock, num_hosts=3)
    assert {len(hosts) for hosts in published(coordinator).values()} == {2}
    assert coordinator.view()["standalone_experts"] == []


def test_a_host_keeps_what_a_router_has_adopted(coordinator, clock):
    a, b, router = started(coordinator, clock)
    held = a.ready
    coordinator.drain("a")
    lagging = router.report.adopted
    for _ in range(4):
        for host in (a, b):
            host.exchange(coordinator)
        router.exchange(coordinator, adopt=False)
        clock.now += 1
    assert b.ready == frozenset(EXPERTS)
    assert coordinator.maps.current.version > lagging == router.report.adopted
    assert a.ready == held, "the lagging router may still ask it"
    router.adopt()
    rounds(coordinator, clock, [router, a, b], 2)
    assert a.ready == frozenset()


def test_a_host_keeps_what_was_handed_to_a_router_that_has_adopted_nothing_yet(coordinator, clock):
    a, b, *_ = started(coordinator, clock)
    late = Router("late")
    handed = late.exchange(coordinator, adopt=False)
    held = handed.host_to_experts[a.key]
    coordinator.drain("a")
    for _ in range(3):
        a.exchange(coordinator)
        b.exchange(coordinator)
        late.exchange(coordinator, adopt=False)
    assert held <= a.ready


def test_a_dead_routers_veto_ends_with_its_lease(coordinator, clock):
    a, b, _router = started(coordinator, clock)
    coordinator.drain("a")
    rounds(coordinator, clock, [a, b], 4)
    assert a.ready
    rounds(coordinator, clock, [a, b], 4)
    assert not a.ready


def test_what_a_host_may_drop_is_not_published_again_without_a_fresh_report(coordinator, clock):
    a, b, router = started(coordinator, clock)
    coordinator.drain("a")
    rounds(coordinator, clock, [b, router], 3)
    report = a.make_report()
    orders = coordinator.exchange_host(report)  # on its way
    assert orders.keep == frozenset()
    clock.now += 1
    coordinator.members.end_host(b.key)  # b's experts have nobody else but a
    coordinator._is_stale = True
    coordinator.observe()
    assert all(a.key not in hosts for hosts in published(coordinator).values())


def test_a_report_that_was_overtaken_changes_nothing(coordinator, clock):
    a, b, router = started(coordinator, clock)
    late = replace(a.report, number=0, ready=frozenset())
    coordinator.exchange_host(late)
    assert coordinator.view()["num_ready"] == 16
    rounds(coordinator, clock, [a, b], 1)
    assert router.exchange(coordinator) is None, "no new map"


def test_a_late_report_does_not_bring_back_a_host_that_is_gone(coordinator, clock):
    a, b, router = started(coordinator, clock)
    late = a.make_report()
    a.exchange(coordinator)
    rounds(coordinator, clock, [b, router], 7)
    coordinator.exchange_host(late)
    assert [host["id"] for host in coordinator.view()["hosts"]] == ["b"]


def test_two_full_hosts_swap_through_their_staging_slots(clock):
    a, b = Host("a", slots=8), Host("b", slots=8)
    router = Router()
    coordinator = new_coordinator(clock)
    rounds(coordinator, clock, [a, b, router], 5)
    swapped = {a.key: b.ready, b.key: a.ready}
    coordinator.planning.desired = dict(swapped)
    coordinator._is_stale = True
    for _ in range(60):
        rounds(coordinator, clock, [a, b, router], 1)
        assert max(len(a.ready), len(b.ready)) <= 9
        assert set(published(coordinator)) == set(EXPERTS)
    assert {a.key: a.ready, b.key: b.ready} == swapped


# -- losses


def test_a_lost_host_is_replaced_by_the_newcomer(coordinator, clock):
    a, b, router = started(coordinator, clock)
    version, lost = router.report.adopted, b.ready
    c = Host("c")
    rounds(coordinator, clock, [a, router], 3)  # b is killed; Serve starts c
    rounds(coordinator, clock, [a, c, router], 6)
    assert router.report.adopted > version
    assert c.ready | a.ready == frozenset(EXPERTS)
    assert {host for hosts in published(coordinator).values() for host in hosts} == {a.key, c.key}
    assert lost <= a.ready | c.ready


def test_experts_that_nobody_else_holds_are_loaded_at_once(coordinator, clock):
    a, _b, router = started(coordinator, clock)
    rounds(coordinator, clock, [a, router], 7)  # one lease, far from the grace
    assert a.ready == frozenset(EXPERTS)
    assert router.report.adopted == coordinator.maps.current.version
    assert any("no host that can be reached" in text for text in texts(coordinator, "rescue"))


def test_a_router_that_cannot_reach_a_host_is_enough_to_load_its_experts_elsewhere(coordinator, clock):
    a, b, router = started(coordinator, clock)
    for host in (a, b):
        host.exchange(coordinator)
    start = clock.now
    while not a.ready >= frozenset(EXPERTS):  # b is dead: it has an open lease, but no channel
        router.exchange(coordinator, suspects=(b.key,))
        a.exchange(coordinator)
        clock.now += 0.1
        assert clock.now < start + 1.0
    a.exchange(coordinator)
    a.exchange(coordinator)
    placement = router.exchange(coordinator, suspects=(b.key,))
    assert all(a.key in hosts for hosts in placement.expert_to_hosts.values())


def test_a_suspects_last_replica_is_never_unpublished(coordinator, clock):
    a, b, router = started(coordinator, clock)
    full = Host("a", slots=8)
    full.key, full.duties, full.report = a.key, a.duties, replace(a.report, slots=8)
    before = published(coordinator)
    for _ in range(20):
        router.exchange(coordinator, suspects=(b.key,))
        full.exchange(coordinator)
        b.exchange(coordinator)  # it is well: only this router cannot reach it
        clock.now += 1
        assert set(published(coordinator)) == set(before)
        assert b.key in {host for hosts in published(coordinator).values() for host in hosts}


def test_a_frozen_host_that_comes_back_has_lost_nothing(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, num_hosts=3, planner=PlannerSettings(min_replicas=2)))
    a, b, c, router = started(coordinator, clock, num_hosts=3)
    held = [host.ready for host in (a, b, c)]
    rounds(coordinator, clock, [a, b, router], 10)
    assert all(c.key not in hosts and hosts for hosts in published(coordinator).values())
    rounds(coordinator, clock, [a, b, c, router], 4)
    assert [host.ready for host in (a, b, c)] == held
    assert {len(hosts) for hosts in published(coordinator).values()} == {2}


def test_experts_with_too_few_replicas_are_rebuilt_after_the_grace(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, num_hosts=3, planner=PlannerSettings(min_replicas=2)))
    a, b, _c, router = started(coordinator, clock, num_hosts=3)
    rounds(coordinator, clock, [a, b, router], 15)
    assert len(a.ready) + len(b.ready) < 2 * len(EXPERTS), "the replacement is waited for"
    rounds(coordinator, clock, [a, b, router], 15)
    assert a.ready == b.ready == frozenset(EXPERTS)
    assert any("no replacement came" in text for text in texts(coordinator, "plan"))


def test_a_coordinator_that_slept_holds_nobodys_silence_against_him(coordinator, clock):
    a, b, router = started(coordinator, clock)
    before = published(coordinator)
    clock.now += 60
    a.exchange(coordinator)
    assert len(coordinator.view()["hosts"]) == 2
    assert published(coordinator) == before
    rounds(coordinator, clock, [a, b, router], 3)
    assert published(coordinator) == before
    assert any("was away" in text for text in texts(coordinator, "lease"))


# -- departures and drains


def test_leaving_hosts_are_planned_as_one_and_may_go_when_no_map_names_them(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, num_hosts=4))
    a, b, c, d, router = started(coordinator, clock, num_hosts=4)
    for host in (a, b):
        host.duties.is_leaving = True
    seen = []
    for _ in range(6):
        orders = a.exchange(coordinator)
        named = any(a.key in hosts for hosts in published(coordinator).values())
        seen.append((orders.may_leave, named))
        rounds(coordinator, clock, [b, c, d, router], 1)
    assert (False, True) in seen
    assert seen[-1] == (True, False)
    assert (True, True) not in seen
    assert c.ready | d.ready == frozenset(EXPERTS)
    assert len([text for text in texts(coordinator, "plan") if "leaving" in text]) <= 2


@pytest.mark.parametrize("why", ["closing", "no router lives"])
def test_a_host_may_leave_at_once_if(coordinator, clock, why):
    a, b, router = started(coordinator, clock, slots=8)
    rounds(coordinator, clock, [a, b] if why == "no router lives" else [a, b, router], 7)
    if why == "closing":
        coordinator.announce_closing()
    b.duties.is_leaving = True
    assert b.exchange(coordinator).may_leave


def test_a_drain_moves_everything_and_is_done(coordinator, clock):
    a, b, router = started(coordinator, clock)
    operation = coordinator.drain("a")
    assert operation.is_open
    assert coordinator.drain("a").id == operation.id, "idempotent"
    rounds(coordinator, clock, [a, b, router], 6)
    assert coordinator.operation(operation.id).state == "done"
    assert a.ready == frozenset()
    rounds(coordinator, clock, [a, b, router], 40)
    assert a.ready == frozenset(), "it stays drained"
    assert coordinator.drain("a").id != operation.id


def test_a_drain_that_cannot_finish_is_rolled_back(clock):
    coordinator = new_coordinator(clock)
    a, b, router = started(coordinator, clock, slots=8)
    operation = coordinator.operation(coordinator.drain("a").id)
    assert operation.state == "rolled_back"
    assert "slots" in operation.detail
    held = a.ready
    rounds(coordinator, clock, [a, b, router], 6)
    assert a.ready == held


def test_a_drain_that_would_leave_too_few_replicas_is_rolled_back(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, planner=PlannerSettings(min_replicas=2)))
    started(coordinator, clock)
    operation = coordinator.drain("a")
    assert operation.state == "rolled_back"
    assert "min_replicas" in operation.detail


def test_a_drain_that_takes_too_long_is_rolled_back(clock):
    coordinator = new_coordinator(clock, replace(LIMITS, operation_timeout_s=10.0))
    a, b, router = started(coordinator, clock)
    operation = coordinator.drain("a")
    for _ in range(12):
        a.exchange(coordinator)
        coordinator.exchange_host(b.make_report())  # it never loads
        router.exchange(coordinator)
        clock.now += 1
    assert coordinator.operation(operation.id).state == "rolled_back"
    rounds(coordinator, clock, [a, b, router], 8)
    assert a.ready, "it takes part again"


def test_a_host_that_dies_while_it_is_drained_is_gone(coordinator, clock):
    _a, b, router = started(coordinator, clock)
    operation = coordinator.drain("a")
    rounds(coordinator, clock, [b, router], 7)
    assert coordinator.operation(operation.id).state == "done"


def test_unknown_names_are_said(coordinator, clock):
    started(coordinator, clock)
    with pytest.raises(UnknownHost, match="a, b"):
        coordinator.drain("z")
    with pytest.raises(UnknownOperation, match="drain-9"):
        coordinator.operation("drain-9")


def test_a_rebalance_is_followed_to_its_end(coordinator, clock):
    a, b, router = started(coordinator, clock)
    hot = {expert: 1000 if expert in a.ready else 1 for expert in EXPERTS}
    operation = coordinator.rebalance()
    assert operation.state in ("running", "done")
    for _ in range(30):
        router.exchange(coordinator, expert_tokens=hot)
        rounds(coordinator, clock, [a, b], 1)
    again = coordinator.rebalance()
    rounds(coordinator, clock, [a, b, router], 12)
    assert coordinator.operation(again.id).state == "done"
    assert coordinator.operation(again.id).detail


# -- load


def test_tokens_are_counted_over_all_reports(coordinator, clock):
    *_hosts, router = started(coordinator, clock)
    for _ in range(3):
        router.exchange(coordinator, expert_tokens={EXPERTS[3]: 5})
    load = coordinator.view()["load"]
    assert load["expert_tokens"] == {"1": {"3": 15}}
    assert load["hottest"][0] | {"tokens_per_s": 0} == {"layer": 1, "expert": 3, "tokens_per_s": 0, "replicas": 1}
    assert load["hottest"][0]["tokens_per_s"] > 0


def test_balancedness_is_of_the_hosts_tokens(coordinator, clock):
    a, b, _router = started(coordinator, clock)
    for _ in range(20):
        for host, tokens in ((a, 300.0), (b, 100.0)):
            host.report = replace(host.report, stats={"num_tokens": tokens, "busy_s": 0.5, "queue_wait_s": 0.2, "num_frames": 10.0})
            host.exchange(coordinator)
        clock.now += 1
    view = coordinator.view()
    assert view["load"]["balancedness"] == pytest.approx(2 / 3, rel=0.05)
    assert view["hosts"][0]["busy_share"] == pytest.approx(0.5, rel=0.2)
    assert view["hosts"][0]["wait_s"] == pytest.approx(0.02, rel=0.1)


# -- epochs, restarts, the store


def test_a_new_coordinator_outranks_the_map_it_hears_of(clock):
    old = MapVersion(4, 17)
    held = {"a": EXPERTS[:8], "b": EXPERTS[8:]}
    a, b = (Host(name, ready=experts) for name, experts in held.items())
    router = Router(adopted=old)
    coordinator = new_coordinator(clock)
    for _ in range(8):
        for member in (router, a, b):
            member.exchange(coordinator)
        clock.now += 1
    assert router.report.adopted > old
    assert {host.key.replica_id: sorted(host.ready) for host in (a, b)} == held, "nothing moved: reports are the map's memory"


def test_for_a_lease_a_new_coordinator_lets_hosts_keep_what_routers_it_has_not_heard_of_may_name(clock):
    a, b = Host("a", ready=EXPERTS), Host("b", ready=EXPERTS[:3])  # from an earlier map
    coordinator = new_coordinator(clock)
    for _ in range(4):
        clock.now += 1
        a.exchange(coordinator)
        assert b.exchange(coordinator).keep >= frozenset(EXPERTS[:3])


def test_nothing_is_planned_in_the_first_lease_while_somebody_is_missing(coordinator, clock):
    a = Host("a")
    for _ in range(4):
        clock.now += 1
        assert a.exchange(coordinator).desired == frozenset()


def test_two_coordinators_the_older_one_ends_itself(clock):
    old = new_coordinator(clock, epoch=10)
    a, b, router = started(old, clock)
    new = new_coordinator(clock, epoch=20)
    a.exchange(new)
    assert a.duties.epoch_seen == 20
    with pytest.raises(Outranked):
        a.exchange(old)
    assert old.is_outranked
    for ask in (old.rebalance, lambda: old.drain("a"), lambda: old.set_scaling({"router": {"min_replicas": 1}})):
        with pytest.raises(Outranked):
            ask()
    with pytest.raises(Outranked):
        router.exchange(old)
    before = router.report.adopted
    rounds(new, clock, [a, b, router], 8)
    assert router.report.adopted > before
    assert not new.is_outranked


def test_members_refuse_orders_of_a_lower_epoch(clock):
    old, new = new_coordinator(clock, epoch=10), new_coordinator(clock, epoch=20)
    a, b, router = started(old, clock)
    late_orders = old.exchange_host(a.make_report())
    late_map = replace(old.maps.current, version=MapVersion(10, 99))
    a.exchange(new)
    router.exchange(new)
    a.obey(replace(late_orders, keep=frozenset(), desired=frozenset()))
    assert a.ready
    assert not router.duties.obey(replace(old.exchange_router(Router("x").make_report()), map=late_map, epoch=10))
    assert b.duties.epoch_seen == 10


def test_a_coordinator_with_a_clock_that_went_back_goes_above_what_members_have_seen(clock):
    old = new_coordinator(clock, epoch=100)
    members = started(old, clock)
    new = new_coordinator(clock, epoch=7, salt=3)
    rounds(new, clock, members, 8)
    assert new.epoch == 104
    assert members[-1].report.adopted.epoch == 104


def test_everything_but_the_store_is_killed_and_the_same_placement_comes_back(clock):
    store = MemoryStore()
    first = new_coordinator(clock, epoch=10)
    a, b, router = started(first, clock)
    first.set_scaling({"expert_host": {"max_replicas": 6}})
    rounds(first, clock, [a, b, router], 1)
    store.write(first.dirty_state())
    version, placement = first.maps.current.version, {tuple(sorted(host.ready)) for host in (a, b)}
    clock.now += 1000
    second = new_coordinator(clock, epoch=10, stored=store.read())
    c, d, other = started(second, clock)[:3]
    assert {tuple(sorted(host.ready)) for host in (c, d)} == placement
    assert second.maps.current.version > version
    assert any("taken up from the state store" in text for text in texts(second, "plan"))
    assert second.view()["scaling"] == {"expert_host": {"max_replicas": 6}}
    assert other.duties.scaling["scaling_version"] > 0


def test_a_stored_placement_goes_to_the_hosts_that_hold_it(clock):
    first = new_coordinator(clock, epoch=10)
    a, b, router = started(first, clock)
    stored = first.dirty_state()
    held = {host.key: host.ready for host in (a, b)}
    second = new_coordinator(clock, epoch=20, stored=stored)
    rounds(second, clock, [b, router, a], 8)
    assert {host.key: host.ready for host in (a, b)} == held


def test_a_store_that_is_away_is_seen_and_comes_back(coordinator, clock):
    started(coordinator, clock)
    assert coordinator.dirty_state() is not None
    assert coordinator.dirty_state() is None, "nothing has changed since"
    coordinator.saving.failed("the state store does not answer")
    assert coordinator.view()["state_store"]["is_available"] is False
    assert coordinator.dirty_state() is not None, "it is written when it is back"
    coordinator.saving.saved()
    assert coordinator.view()["state_store"]["is_available"] is True
    assert [text for text in texts(coordinator, "store")][-1].endswith("is back")
    clock.now += 11
    assert coordinator.dirty_state() is not None, "the load windows alone are worth a write now and then"


# -- what people see


def test_too_few_slots_is_said(coordinator, clock):
    members = [Host("a", slots=4), Host("b", slots=4), Router()]
    rounds(coordinator, clock, members, 3)
    assert "slots" in coordinator.registry().failure


def test_a_host_that_cannot_load_is_said(coordinator, clock):
    a, *_others, router = started(coordinator, clock)
    version = router.report.adopted
    a.report = replace(a.report, failure="expert 3 of layer 1 cannot be loaded")
    a.exchange(coordinator)
    assert coordinator.registry().failure == "host a: expert 3 of layer 1 cannot be loaded"
    assert "host a: expert 3 of layer 1 cannot be loaded" in coordinator.view()["events"][-1]["text"]
    assert router.report.adopted == version
    a.report = replace(a.report, failure=None)
    a.exchange(coordinator)
    assert coordinator.registry().failure is None


def test_a_dense_model_has_an_empty_map_at_once(clock):
    router = Router()
    dense = Coordinator([], CoordinatorLimits(0, 1), clock)
    assert router.exchange(dense).expert_to_hosts == {}
    router.adopt()
    assert dense.rebalance().state == "done"
    again = Coordinator([], CoordinatorLimits(0, 1), clock, epoch=2)
    assert router.exchange(again).version == MapVersion(2, 1)


def test_bounds_reach_the_members_they_are_for(coordinator, clock):
    a, b, router = started(coordinator, clock)
    assert router.exchange(coordinator) is None
    operation = coordinator.set_scaling({"expert_host": {"min_replicas": 2, "max_replicas": 5}})
    assert coordinator.set_scaling({"expert_host": {"min_replicas": 2, "max_replicas": 5}}).id == operation.id
    assert operation.is_open
    rounds(coordinator, clock, [a, b, router], 1)
    assert coordinator.operation(operation.id).state == "done"
    assert (a.duties.scaling["scaling_min"], a.duties.scaling["scaling_max"]) == (2.0, 5.0)
    assert "scaling_min" not in router.duties.scaling
    assert coordinator.registry().scaling["scaling_version"] == a.duties.scaling["scaling_version"]
    for wrong in (
        {"host": {}},
        {"router": {"min": 1}},
        {"router": {"min_replicas": 0}},
        {"router": {"min_replicas": 3, "max_replicas": 2}},
    ):
        with pytest.raises(BadBounds):
            coordinator.set_scaling(wrong)


def test_the_view_is_plain(coordinator, clock):
    started(coordinator, clock)
    view = json.loads(json.dumps(coordinator.view()))
    assert view["num_ready"] == view["num_experts"] == 16
    assert len(view["placement"]["layers"]["1"]) == 8
    assert len(view["standalone_experts"]) == 16
    assert any("published map 1.1" in event["text"] for event in view["events"])
    numbers = [line["n"] for line in view["decisions"]]
    assert numbers == sorted(numbers)
    assert {"n", "time_unix_s", "kind", "text", "num_moves"} <= set(next(line for line in view["decisions"] if line["kind"] == "plan"))
    assert view["hosts"][0]["id"] == HostKey("a", 1).replica_id


def test_experts_of_a_host_that_nobody_listens_for_any_more_are_loaded_elsewhere_at_once(coordinator, clock):
    a, b, router = started(coordinator, clock)
    router.exchange(coordinator, suspects=(b.key,))
    assert not coordinator.host_orders(a.report).desired - a.ready
    router.exchange(coordinator, suspects=(b.key,), dead=(b.key,))
    assert coordinator.host_orders(a.report).desired == a.ready | b.ready
