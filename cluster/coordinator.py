"""The control loop: who is alive, what each host should hold, and which map is published. Never on the token path."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.exchange import HostOrders, HostReport, Registry, RouterEntry, RouterOrders, RouterReport
from cluster.placement import NotEnoughSlots, plan
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion, PlacementMap

logger = logging.getLogger("shoal")


@dataclass(frozen=True)
class CoordinatorLimits:
    """Times in seconds; `num_hosts` and `num_routers` are how many Serve is asked to run."""

    num_hosts: int
    num_routers: int
    lease_s: float = 5.0
    orphan_grace_s: float = 20.0


@dataclass
class _Member:
    report: Any
    heard_s: float


@dataclass
class Coordinator:
    """Desired, ready, published: a map names ready replicas only, and a host keeps what any adopted map names.

    One thread calls it. Static placement: one replica of each expert. `clock` is monotonic, in seconds.
    """

    experts: Sequence[LogicalExpert]
    limits: CoordinatorLimits
    clock: Callable[[], float] = time.monotonic
    epoch: int = 1
    _hosts: dict[HostKey, _Member] = field(default_factory=dict)
    _routers: dict[HostKey, _Member] = field(default_factory=dict)
    _desired: dict[HostKey, frozenset[LogicalExpert]] = field(default_factory=dict)
    _map: PlacementMap | None = None
    _is_stale: bool = True  # something has changed since the last plan
    _is_settled: bool = False  # everybody who may remember a map has had a lease to say so
    _failure: str | None = None
    _expert_tokens: Counter[LogicalExpert] = field(default_factory=Counter)
    _events: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=256))
    _num_events: int = 0

    def __post_init__(self) -> None:
        self._started_s = self.clock()
        self._short_of_hosts_since_s: float | None = self._started_s
        if not self.experts:  # a dense model: its map is empty, complete and published from the start
            self._map = PlacementMap(MapVersion(self.epoch, 1), {}, {})

    def exchange_host(self, report: HostReport) -> HostOrders:
        """Takes a host's report, answers with what it should hold."""
        self._hear("host", self._hosts, report)
        self._observe()
        desired = self._desired.get(report.key, report.ready)
        return HostOrders(desired=desired, keep=desired | self._pinned(report))

    def exchange_router(self, report: RouterReport) -> RouterOrders:
        """Takes a router's report, answers with the published map if the router has an older one."""
        if self._hear("router", self._routers, report):
            self._expert_tokens.update(report.expert_tokens)
            self._outrank(report.adopted)
        self._observe()
        newer = self._map is not None and (report.adopted is None or report.adopted < self._map.version)
        return RouterOrders(self._map if newer else None)

    def _hear(self, kind: str, members: dict[HostKey, _Member], report: HostReport | RouterReport) -> bool:
        """Notes a report; False for one that was overtaken by a later one of the same member."""
        known = members.get(report.key)
        if known is not None and report.number <= known.report.number:
            return False
        if known is None:
            self._tell(f"{kind} {report.key.replica_id} joined")
        self._is_stale |= known is None or _plans_by(known.report) != _plans_by(report)
        members[report.key] = _Member(report, self.clock())
        return True

    def registry(self) -> Registry:
        """What gateways need: the live routers that can answer, fullest report included."""
        self._observe()
        routers = tuple(
            RouterEntry(key, member.report.endpoint, member.report.stats)
            for key, member in self._routers.items()
            if member.report.adopted is not None
        )
        return Registry(routers, len(routers) >= self.limits.num_routers, self._failure, self._progress())

    def view(self) -> dict[str, Any]:
        """Placement, load and hosts as plain values, for people and HTTP."""
        self._observe()
        published = self._map.expert_to_hosts if self._map else {}
        placement: dict[str, dict[str, list[str]]] = {}
        for expert, holders in sorted(published.items()):
            placement.setdefault(str(expert.layer), {})[str(expert.expert)] = [host.replica_id for host in holders]
        hosts = [self._host_view(key, member.report) for key, member in sorted(self._hosts.items())]
        routers = [self._router_view(key, member.report) for key, member in sorted(self._routers.items())]
        return {
            "placement": {"version": list(self._map.version) if self._map else None, "layers": placement},
            "hosts": hosts,
            "routers": routers,
            "load": {"expert_tokens": self._tokens_by_layer(), "routers": routers},
            "failure": self._failure,
            "num_experts": len(self.experts),
            "num_ready": self._num_ready(),
            "events": [{"n": n, "text": text} for n, text in self._events],
        }

    def _outrank(self, adopted: MapVersion | None) -> None:
        """Versions never go backwards: a map of an earlier Coordinator is followed by one of a higher epoch."""
        known = self._map.version if self._map else MapVersion(self.epoch, 0)
        if adopted is None or adopted <= known:
            return
        self.epoch = adopted.epoch + 1
        if self._map is not None:
            self._map = replace(self._map, version=MapVersion(self.epoch, 1))

    def _host_view(self, key: HostKey, report: HostReport) -> dict[str, Any]:
        published = self._map.host_to_experts.get(key, frozenset()) if self._map else frozenset()
        return {
            "id": key.replica_id,
            "incarnation": key.incarnation,
            "node_id": report.endpoint.node_id,
            "ready": len(report.ready),
            "desired": len(self._desired.get(key, frozenset())),
            "published": len(published),
            "slots": report.slots,
            **report.stats,
        }

    def _router_view(self, key: HostKey, report: RouterReport) -> dict[str, Any]:
        return {
            "id": key.replica_id,
            "incarnation": key.incarnation,
            "node_id": report.endpoint.node_id,
            "map_version": list(report.adopted) if report.adopted else None,
            "suspects": [host.replica_id for host in report.suspects],
            **report.stats,
        }

    def _tokens_by_layer(self) -> dict[str, dict[str, int]]:
        """Tokens routed to each expert since this Coordinator started."""
        layers: dict[str, dict[str, int]] = {}
        for expert, tokens in sorted(self._expert_tokens.items()):
            layers.setdefault(str(expert.layer), {})[str(expert.expert)] = tokens
        return layers

    def _tell(self, event: str) -> None:
        """One readable line per event: in the log, and for whoever watches."""
        logger.info(event)
        self._num_events += 1
        self._events.append((self._num_events, event))

    def _progress(self) -> str:
        return f"{len(self._hosts)} of {self.limits.num_hosts} hosts, {self._num_ready()} of {len(self.experts)} experts ready"

    def _num_ready(self) -> int:
        return len(frozenset().union(*(member.report.ready for member in self._hosts.values())))

    def _pinned(self, report: HostReport) -> frozenset[LogicalExpert]:
        """What some router may still ask this host for: the published map's, and all of it while any router may be behind."""
        if self._map is None or not self._is_settled:
            return report.ready
        behind = any(member.report.adopted != self._map.version for member in self._routers.values())
        return report.ready if behind else self._map.host_to_experts.get(report.key, frozenset())

    def _observe(self) -> None:
        """Forgets members whose lease ended; plans and publishes if anything has changed since the last time."""
        now = self.clock()
        for members, kind in ((self._hosts, "host"), (self._routers, "router")):
            for key in [key for key, member in members.items() if now - member.heard_s > self.limits.lease_s]:
                self._tell(f"{kind} {key.replica_id} has been silent for {self.limits.lease_s:.0f} s: its lease ended")
                del members[key]
                self._is_stale = True
        if not self._is_stale or not self.experts:
            return
        failures = [f"host {key.replica_id}: {member.report.failure}" for key, member in self._hosts.items() if member.report.failure]
        if failures and failures[0] != self._failure:
            self._tell(failures[0])
        self._failure = failures[0] if failures else None
        if self._may_plan(now):
            self._is_stale = False
            self._plan()
        self._publish()

    def _may_plan(self, now: float) -> bool:
        """From nothing, only once every member had a lease to report; short of hosts, only after the grace."""
        everyone = len(self._hosts) >= self.limits.num_hosts
        self._short_of_hosts_since_s = None if everyone else self._short_of_hosts_since_s or now
        remembered = any(member.report.adopted is not None for member in self._routers.values())
        fresh = everyone and len(self._routers) >= self.limits.num_routers and not remembered
        self._is_settled |= fresh or now - self._started_s >= self.limits.lease_s
        if not self._is_settled:
            return False
        if self._short_of_hosts_since_s is None:
            return True
        # At a first start Serve may still be bringing hosts up: nobody waits for an answer yet, so neither do we give up on them.
        return self._map is not None and bool(self._hosts) and now - self._short_of_hosts_since_s > self.limits.orphan_grace_s

    def _plan(self) -> None:
        hosts = {key: member.report.slots for key, member in self._hosts.items()}
        present = {key: self._desired.get(key) or member.report.ready for key, member in self._hosts.items()}
        try:
            self._desired = plan(self.experts, hosts, present)
        except NotEnoughSlots as error:
            self._failure = str(error)

    def _publish(self) -> None:
        """Publishes a map of ready replicas as soon as every expert has one and the map would say something new."""
        ready = {key: member.report.ready for key, member in self._hosts.items()}
        expert_to_hosts: dict[LogicalExpert, tuple[HostKey, ...]] = {}
        for expert in self.experts:
            wanted = tuple(key for key, desired in self._desired.items() if expert in desired and expert in ready.get(key, ()))
            holders = wanted or tuple(key for key, held in ready.items() if expert in held)[:1]
            if not holders:
                return
            expert_to_hosts[expert] = holders
        if self._map is not None and expert_to_hosts == self._map.expert_to_hosts:
            return
        n = self._map.version.n + 1 if self._map else 1
        hosts = {key: member.report.endpoint for key, member in self._hosts.items()}
        self._map = PlacementMap(MapVersion(self.epoch, n), hosts, expert_to_hosts)
        self._tell(f"published map {self.epoch}.{n}: {len(expert_to_hosts)} experts on {len(hosts)} hosts")


def _plans_by(report: HostReport | RouterReport) -> object:
    """What of a report the plan, the map or the failure depend on."""
    if isinstance(report, HostReport):
        return report.ready, report.slots, report.failure
    return report.adopted
