"""What outlives a Coordinator: made for the store, and taken up from it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.desired_placement import StoredHost
from cluster.state_store import StoredState
from router.placement_map import MapVersion

if TYPE_CHECKING:
    from cluster.coordinator import Coordinator

NUM_DECISIONS = 64


def state_of(coordinator: "Coordinator", now_s: float) -> StoredState:
    """What the store should hold now."""
    hosts, planning = coordinator.members.hosts, coordinator.planning
    standing = tuple(
        StoredHost(key, hosts[key].report.endpoint.node_id, planning.desired[key]) for key in sorted(planning.desired) if key in hosts
    )
    is_whole = planning.has_begun and any(host.experts for host in standing)
    return StoredState(
        version=coordinator.maps.current.version if coordinator.maps.current else MapVersion(coordinator.epoch, 0),
        # While too few are here to hold everything, what was wanted last is what is worth keeping.
        hosts=standing if is_whole else planning.stored_hosts,
        loads=coordinator.loads.experts_long.rates(now_s),
        scaling=coordinator.bounds.by_role,
        draining=tuple(sorted(planning.drained)),
        decisions=tuple(coordinator.log.lines[-NUM_DECISIONS:]),
    )


def take_up(coordinator: "Coordinator", stored: StoredState, now_s: float) -> None:
    """For one that has planned nothing yet."""
    coordinator.log.restore(stored.decisions)
    coordinator.loads.experts_long.restore(stored.loads, now_s)
    coordinator.bounds.restore(stored.scaling)
    coordinator.planning.drained = set(stored.draining)
    known = frozenset(coordinator.experts)
    coordinator.planning.stored_hosts = tuple(replace(host, experts=host.experts & known) for host in stored.hosts)
    epoch, n = stored.version
    coordinator.log.tell("store", f"the state store remembers map {epoch}.{n} and {len(stored.hosts)} hosts")
