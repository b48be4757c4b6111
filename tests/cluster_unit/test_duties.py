"""What members do with orders, and when a host may go; and the thread that fetches the orders."""

import threading

import pytest

from actors.duties import HostDuties, LeaveLimits, RouterDuties
from actors.exchange import Exchange, HostOrders, RouterOrders
from model.logical_expert import LogicalExpert
from router.placement_map import MapVersion, PlacementMap

E = [LogicalExpert(1, expert) for expert in range(6)]
WAIT_S = 10.0


def test_a_host_drops_only_what_it_need_not_keep():
    duties = HostDuties()
    assert duties.obey(HostOrders(frozenset(E[:2]), frozenset(E[:3]), epoch=5), frozenset(E[1:5])) == frozenset(E[3:5])
    assert duties.desired == frozenset(E[:2])
    assert duties.epoch_seen == 5


def test_orders_of_a_lower_epoch_are_refused():
    duties = HostDuties(desired=frozenset(E[:1]), epoch_seen=7)
    late = HostOrders(frozenset(), frozenset(), epoch=6, may_leave=True, scaling={"scaling_min": 3.0})
    assert duties.obey(late, frozenset(E)) == frozenset()
    assert (duties.desired, duties.may_leave, duties.scaling, duties.epoch_seen) == (frozenset(E[:1]), False, {}, 7)
    assert duties.obey(HostOrders(frozenset(), frozenset(), epoch=7), frozenset(E)) == frozenset(E)


def test_a_full_host_loads_one_at_a_time_through_its_staging_slot():
    duties = HostDuties(desired=frozenset(E[2:5]))
    assert duties.to_load(frozenset(E[:3]), slots=3) == [E[3]]
    assert duties.to_load(frozenset(E[:4]), slots=3) == []
    assert duties.to_load(frozenset(E[1:3]), slots=3) == [E[3], E[4]]
    assert duties.to_load(frozenset(), slots=None) == E[2:5]


@pytest.mark.parametrize(
    ("leaving_s", "silent_s", "may_leave", "reason"),
    [
        (0.0, 0.0, True, "no map"),
        (1.0, 0.2, False, None),
        (100.0, 0.2, False, None),
        (2.0, 60.0, False, None),  # silent long before: it may just be starting again
        (2.6, 60.0, False, "silent for 60.0 s"),
        (297.9, 0.2, False, None),
        (298.0, 0.2, False, "not taken over within 298 s"),
    ],
)
def test_when_a_host_may_go(leaving_s, silent_s, may_leave, reason):
    why = LeaveLimits(timeout_s=300.0).reason_to_go(leaving_s, silent_s, may_leave=may_leave)
    assert why is None if reason is None else reason in why


def test_a_router_takes_newer_maps_only():
    def orders(epoch, n, of=None):
        return RouterOrders(PlacementMap(MapVersion(epoch, n), {}, {}), of or epoch)

    duties = RouterDuties()
    assert duties.held is None
    assert duties.obey(orders(3, 2))
    assert not duties.obey(orders(3, 2))
    assert not duties.obey(orders(3, 1))
    assert not duties.obey(orders(2, 9))
    assert not duties.obey(RouterOrders(None, epoch=4))
    assert not duties.obey(orders(3, 5)), "epoch 4 has been seen"
    assert duties.obey(orders(4, 1))
    assert duties.held == MapVersion(4, 1)


class Calls:
    """Counts calls, and lets a test wait for the next one."""

    def __init__(self):
        self.num = 0
        self.changed = threading.Condition()

    def __call__(self):
        with self.changed:
            self.num += 1
            self.changed.notify_all()

    def wait_for(self, num):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num >= num, WAIT_S)


def test_an_exchange_that_hurries_does_not_wait_for_its_interval():
    calls = Calls()
    exchange = Exchange(calls, lambda orders: None, interval_s=1000.0)
    calls.wait_for(1)
    exchange.hurry()
    calls.wait_for(2)
    exchange.close()
    assert calls.num in (2, 3)


def test_an_urgent_exchange_goes_on_calling():
    calls, urgent = Calls(), threading.Event()
    exchange = Exchange(calls, lambda orders: None, interval_s=1000.0, is_urgent=urgent.is_set)
    calls.wait_for(1)
    urgent.set()
    calls.wait_for(4)
    exchange.close()


def test_a_silent_coordinator_changes_nothing_and_is_asked_again():
    calls, obeyed = Calls(), []

    def call():
        calls()
        if calls.num < 3:
            raise ConnectionError("restarting")
        return "orders"

    exchange = Exchange(call, obeyed.append, interval_s=0.01)
    before = exchange.answered_s
    calls.wait_for(4)
    exchange.close()
    assert obeyed
    assert set(obeyed) == {"orders"}
    assert exchange.answered_s > before
