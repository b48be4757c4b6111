"""Members that run on a made-up clock: what tests of the control loop hand to a Coordinator."""

from dataclasses import replace

from actors.duties import HostDuties, RouterDuties
from actors.exchange import HostReport, RouterReport
from router.placement_map import Endpoint, HostKey


class Clock:
    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now


class Host:
    """A host that loads what it is told at once, as far as it has room, and reports it at its next call."""

    def __init__(self, name, slots=None, ready=(), node="node", incarnation=1, **fields):
        self.key = HostKey(name, incarnation)
        self.duties = HostDuties()
        self.report = HostReport(self.key, Endpoint(node, name, "127.0.0.1", 1), 0, frozenset(ready), slots=slots, **fields)

    @property
    def ready(self):
        return self.report.ready

    def make_report(self):
        self.report = replace(
            self.report, number=self.report.number + 1, epoch_seen=self.duties.epoch_seen, is_leaving=self.duties.is_leaving
        )
        return self.report

    def obey(self, orders):
        ready = self.ready - self.duties.obey(orders, self.ready)
        self.report = replace(self.report, ready=ready | set(self.duties.to_load(ready, self.report.slots)))

    def exchange(self, coordinator):
        orders = coordinator.exchange_host(self.make_report())
        self.obey(orders)
        return orders


class Router:
    """A router that adopts at once what it is given."""

    def __init__(self, name="r", adopted=None, incarnation=1):
        self.duties = RouterDuties(epoch_seen=adopted.epoch if adopted else 0)
        self.report = RouterReport(HostKey(name, incarnation), Endpoint("node", name, "127.0.0.1", 1), 0, adopted)

    @property
    def key(self):
        return self.report.key

    def make_report(self, **fields):
        held = self.duties.held or self.report.adopted
        seen = self.duties.epoch_seen
        self.report = replace(self.report, number=self.report.number + 1, epoch_seen=seen, held=held, **fields)
        return self.report

    def exchange(self, coordinator, *, adopt=True, **fields):
        orders = coordinator.exchange_router(self.make_report(**fields))
        if self.duties.obey(orders) and adopt:
            self.adopt()
        return orders.map

    def adopt(self):
        self.report = replace(self.report, adopted=self.duties.held)
