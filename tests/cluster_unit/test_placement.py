"""The static planner: every expert once, nothing moved without need, each layer spread evenly."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import HostCapacity, NotEnoughSlots, PlannerSettings, prepare
from cluster.placement import plan as full_plan
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    prepare()


def hosts_named(count: int, slots: int | None = None) -> dict[HostKey, int | None]:
    return {HostKey(f"host-{index}", 1): slots for index in range(count)}


def plan(experts, hosts, present):
    """One replica each and no loads."""
    capacities = {host: HostCapacity("node", slots) for host, slots in hosts.items()}
    return full_plan(experts, capacities, present, {}, 100, PlannerSettings()).desired


def model_experts(layers: int, per_layer: int) -> list[LogicalExpert]:
    return [LogicalExpert(layer, expert) for layer in range(1, layers + 1) for expert in range(per_layer)]


@st.composite
def situations(draw):
    """Experts, hosts with and without limits, and what some of them (and some dead ones) hold already."""
    experts = model_experts(draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    slots = st.one_of(st.none(), st.integers(0, len(experts)))
    hosts = {HostKey(f"host-{index}", draw(st.integers(1, 2))): draw(slots) for index in range(draw(st.integers(1, 5)))}
    strangers = [LogicalExpert(99, 0), HostKey("dead", 1)]
    held = st.frozensets(st.sampled_from([*experts, strangers[0]]))
    present = {host: draw(held) for host in [*hosts, strangers[1]] if draw(st.booleans())}
    return experts, hosts, present


@given(situations(), st.randoms(use_true_random=False))
def test_every_expert_once_within_the_slots_and_kept_where_it_is(situation, rng: random.Random):
    experts, hosts, present = situation
    room = float("inf") if None in hosts.values() else sum(hosts.values())
    if room < len(experts):
        with pytest.raises(NotEnoughSlots) as raised:
            plan(experts, hosts, present)
        assert len(raised.value.missing) == len(experts) - room
        return
    planned = plan(experts, hosts, present)
    assert planned.keys() == hosts.keys()
    assert Counter(expert for held in planned.values() for expert in held) == Counter(experts)
    for host, held in planned.items():
        slots = hosts[host]
        assert slots is None or len(held) <= slots
        leaving = (present.get(host, frozenset()) & set(experts)) - held
        for expert in leaving:  # only a full host, or another holder, is a reason to leave
            elsewhere = any(expert in other and expert in present.get(key, ()) for key, other in planned.items() if key != host)
            assert elsewhere or len(held) == slots
    shuffled_hosts = dict(rng.sample(list(hosts.items()), len(hosts)))
    shuffled_experts = rng.sample(experts, len(experts))
    assert plan(shuffled_experts, shuffled_hosts, dict(reversed(present.items()))) == planned


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9))
def test_from_nothing_each_layer_and_the_whole_are_even(layers: int, per_layer: int, num_hosts: int):
    planned = plan(model_experts(layers, per_layer), hosts_named(num_hosts), {})
    for layer in range(1, layers + 1):
        counts = [sum(expert.layer == layer for expert in held) for held in planned.values()]
        assert max(counts) - min(counts) <= 1
    totals = [len(held) for held in planned.values()]
    assert max(totals) - min(totals) <= 1


def test_sixty_four_experts_on_three_hosts():
    planned = plan(model_experts(3, 64), hosts_named(3), {})
    for layer in (1, 2, 3):
        counts = sorted(sum(expert.layer == layer for expert in held) for held in planned.values())
        assert counts == [21, 21, 22]
    assert {len(held) for held in planned.values()} == {64}


def test_a_lost_host_s_experts_are_spread_and_the_others_stay():
    experts = model_experts(2, 8)
    before = plan(experts, hosts_named(4), {})
    dead, *living = sorted(before)
    after = plan(experts, dict.fromkeys(living), before)
    assert all(before[host] <= after[host] for host in living)
    assert sorted(len(after[host]) for host in living) == [5, 5, 6]
    assert dead not in after


def test_a_new_life_of_a_host_starts_empty():
    old, new = HostKey("host-0", 1), HostKey("host-0", 2)
    other = HostKey("host-1", 1)
    planned = plan(model_experts(1, 4), {new: None, other: None}, {old: frozenset(model_experts(1, 4)), other: frozenset()})
    assert {len(held) for held in planned.values()} == {2}


def test_the_error_names_numbers_and_experts():
    with pytest.raises(NotEnoughSlots, match=r"8 experts do not fit the 6 slots of 2 expert hosts: .*layer 1 expert 6, layer 1 expert 7"):
        plan(model_experts(1, 8), hosts_named(2, slots=3), {})
    with pytest.raises(NotEnoughSlots, match="0 expert hosts"):
        plan(model_experts(1, 8), {}, {})
    assert plan([], {}, {}) == {}
