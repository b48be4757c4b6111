"""The application at one moment, as values: taken on the Coordinator's one thread, turned into text on another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.metrics import Sums
from cluster.coordinator_view import host_balancedness
from model.logical_expert import LogicalExpert
from router.placement_map import PlacementMap

if TYPE_CHECKING:
    from cluster.coordinator import Coordinator

Gauges = Mapping[str, float]


@dataclass(frozen=True)
class Snapshot:
    """`sums` are of all members there ever were, `expert_tokens` likewise; gauges are of those that live, by replica id."""

    model_name: str
    sums: Sums
    expert_tokens: Mapping[LogicalExpert, int]
    placement: PlacementMap | None
    num_experts: int
    num_experts_ready: int
    balancedness: float | None
    planned_balancedness: float | None
    decisions: Mapping[str, int]
    member_events: Mapping[str, int]
    num_moves: int
    num_moved_bytes: int
    gateways: Mapping[str, Gauges] = field(default_factory=dict)
    routers: Mapping[str, Gauges] = field(default_factory=dict)
    hosts: Mapping[str, Gauges] = field(default_factory=dict)


def take_snapshot(coordinator: "Coordinator", model_name: str, sums: Sums, gateways: Mapping[str, Gauges], now_s: float) -> Snapshot:
    """Copies what changes; cheap enough for the control loop, at any number of experts."""
    members, loads, tally, plan = coordinator.members, coordinator.loads, coordinator.log.tally, coordinator.planning.last_plan
    suspects = members.suspected_for(now_s)
    host_loads = loads.host_loads(tuple(members.hosts), now_s)
    hosts = {
        key.replica_id: {
            **host_loads[key],
            "queued_tokens": member.report.stats.get("queued_tokens", 0.0),
            "num_experts": float(len(member.ready)),
            "is_suspected": float(key in suspects),
        }
        for key, member in members.hosts.items()
    }
    routers = {
        key.replica_id: {**member.report.stats, "map_n": float(member.report.adopted.n if member.report.adopted else 0)}
        for key, member in members.routers.items()
    }
    return Snapshot(
        model_name=model_name,
        sums=dict(sums),
        expert_tokens=dict(loads.num_tokens),
        placement=coordinator.maps.current,
        num_experts=len(coordinator.experts),
        num_experts_ready=coordinator.num_ready,
        balancedness=host_balancedness(coordinator, host_loads),
        planned_balancedness=None if plan is None else plan.balancedness,
        decisions=dict(tally.by_kind),
        member_events=dict(tally.by_event),
        num_moves=tally.num_moves,
        num_moved_bytes=tally.num_bytes,
        gateways=dict(gateways),
        routers=routers,
        hosts=hosts,
    )
