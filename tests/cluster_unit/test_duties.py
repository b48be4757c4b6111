"""What members owe the Coordinator: orders of lower epochs are refused, nothing in use is dropped, and nobody stays for ever."""

import pytest

from actors.duties import FinishLimits, HostDuties, LeaveLimits, RouterDuties
from actors.exchange import HostOrders, RouterOrders
from model.logical_expert import LogicalExpert
from router.placement_map import MapVersion, PlacementMap

ONE, TWO, THREE = (LogicalExpert(1, expert) for expert in range(3))


def test_a_host_drops_only_what_it_is_not_to_keep_and_nothing_on_a_lower_epoch():
    duties = HostDuties()
    assert duties.obey(HostOrders(desired=frozenset({ONE}), keep=frozenset({ONE, TWO}), epoch=5), frozenset({ONE, TWO, THREE})) == {THREE}
    assert duties.obey(HostOrders(desired=frozenset(), keep=frozenset(), epoch=4, may_leave=True), frozenset({ONE})) == frozenset()
    assert (duties.desired, duties.may_leave) == ({ONE}, False)


def test_a_full_host_loads_one_more_than_its_slots_for_a_swap():
    duties = HostDuties(desired=frozenset({ONE, TWO, THREE}))
    assert duties.to_load(frozenset(), slots=None) == [ONE, TWO, THREE]
    assert duties.to_load(frozenset({ONE}), slots=1) == [TWO]
    assert duties.to_load(frozenset({ONE, TWO}), slots=1) == []


def test_a_router_takes_newer_maps_of_epochs_that_are_not_lower():
    duties = RouterDuties()
    older, newer = (PlacementMap(MapVersion(2, n), {}, {}) for n in (1, 2))
    assert duties.obey(RouterOrders(newer, epoch=2))
    assert not duties.obey(RouterOrders(older, epoch=2))
    assert not duties.obey(RouterOrders(PlacementMap(MapVersion(1, 9), {}, {}), epoch=1, may_leave=True))
    assert (duties.map, duties.may_leave) == (newer, False)


@pytest.mark.parametrize(
    ("leaving_s", "silent_s", "may_leave", "why"),
    [
        (0.1, 0.0, True, "no map in use"),
        (1.0, 60.0, False, None),
        (2.5, 2.5, False, "silent"),
        (57.9, 0.5, False, None),
        (58.0, 0.5, False, "not taken over"),
    ],
)
def test_a_leaving_host_waits_for_others_to_take_over_but_not_for_ever(leaving_s, silent_s, may_leave, why):
    reason = LeaveLimits(timeout_s=60.0).reason_to_go(leaving_s, silent_s, may_leave=may_leave)
    assert reason is None if why is None else why in reason


@pytest.mark.parametrize(
    ("leaving_s", "is_idle", "may_leave", "why"),
    [
        (0.0, False, True, "closing"),
        (1.9, True, False, None),
        (2.0, True, False, "last answer"),
        (57.9, False, False, None),
        (58.0, False, False, "others"),
    ],
)
def test_a_leaving_router_finishes_its_answers_but_not_for_ever(leaving_s, is_idle, may_leave, why):
    reason = FinishLimits(timeout_s=60.0, settle_s=2.0).reason_to_go(leaving_s, is_idle=is_idle, may_leave=may_leave)
    assert reason is None if why is None else why.replace("others", "other routers") in reason
