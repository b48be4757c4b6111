"""Desired placements other than the planner's own: taken up again after a restart, or mended after a loss. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.members import HostMember
from cluster.placement import HostCapacity, PlannerSettings, plan
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

Placement = dict[HostKey, frozenset[LogicalExpert]]


@dataclass(frozen=True)
class StoredHost:
    """What one host should hold, as it was written down; its key and node serve to find it, or its heir, again."""

    key: HostKey
    node_id: str
    experts: frozenset[LogicalExpert]


def capacities(hosts: Mapping[HostKey, HostMember]) -> dict[HostKey, HostCapacity]:
    """What each host can carry, by its report. Its bytes without those of one expert: room to load before another is dropped.

    `slots` are as configured: there, the host itself takes one more while experts are exchanged.
    """
    found = {}
    for key, member in hosts.items():
        report = member.report
        num_bytes = None if report.bytes_limit is None else report.bytes_limit - report.expert_bytes
        found[key] = HostCapacity(report.endpoint.node_id, report.slots, num_bytes, report.speed)
    return found


def expert_bytes(hosts: Mapping[HostKey, HostMember]) -> int:
    """What one expert takes, 0 until a host has loaded one."""
    return max((member.report.expert_bytes for member in hosts.values()), default=0)


def uncovered(experts: Sequence[LogicalExpert], holding: Mapping[HostKey, Collection[LogicalExpert]]) -> list[LogicalExpert]:
    """The experts that none of these hosts holds or is to hold."""
    covered = frozenset[LogicalExpert]().union(*holding.values())
    return [expert for expert in experts if expert not in covered]


def mended(
    missing: Sequence[LogicalExpert],
    desired: Mapping[HostKey, frozenset[LogicalExpert]],
    hosts: Mapping[HostKey, HostCapacity],
    loads: Mapping[LogicalExpert, float],
    num_bytes: int,
) -> Placement:
    """`desired` with the missing experts put where there is room left on `hosts`; nothing else changes. Raises NotEnoughSlots."""
    room = {}
    for key, capacity in hosts.items():
        num_held = len(desired.get(key, ()))
        slots = None if capacity.slots is None else capacity.slots - num_held
        left_bytes = None if capacity.bytes is None else capacity.bytes - num_held * num_bytes
        if (slots is None or slots > 0) and (left_bytes is None or left_bytes >= max(num_bytes, 1)):
            room[key] = HostCapacity(capacity.node_id, slots, left_bytes, capacity.speed)
    added = plan(missing, room, {}, loads, num_bytes, PlannerSettings(min_replicas=1, redundancy=0.0)).desired
    return {key: desired.get(key, frozenset()) | added.get(key, frozenset()) for key in {*desired, *added}}


def taken_up(stored: Sequence[StoredHost], hosts: Mapping[HostKey, HostMember]) -> Placement:
    """The stored placement on the hosts of today: each goes to the same host, else to the one most like it.

    Likest is who holds most of it, then who is on the same node. A host gets one stored set at most; what it has no slot for, and
    sets without an heir, are left to the planner.
    """
    left = {host.key: host for host in stored}
    placement = {key: left.pop(key).experts for key in sorted(hosts) if key in left}
    free = [key for key in sorted(hosts) if key not in placement]
    pairs = sorted(
        (-len(host.experts & hosts[key].report.ready), host.node_id != hosts[key].report.endpoint.node_id, host.key, key)
        for host in left.values()
        for key in free
    )
    for _, _, old, key in pairs:
        if old in left and key not in placement:
            placement[key] = left.pop(old).experts
    for key, experts in placement.items():
        slots = hosts[key].report.slots
        if slots is not None and len(experts) > slots:
            placement[key] = frozenset(sorted(experts)[:slots])
    return placement
