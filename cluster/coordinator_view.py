"""The Coordinator's state as plain values: strings, numbers, lists and dicts only, for people and HTTP."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.exchange import RouterReport
from cluster.load_window import balancedness
from cluster.members import HostMember
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

if TYPE_CHECKING:
    from cluster.coordinator import Coordinator

NUM_HOTTEST = 16


def plain_view(coordinator: "Coordinator", now_s: float) -> dict[str, Any]:
    """See Coordinator.view."""
    published = coordinator.maps.current
    expert_to_hosts = published.expert_to_hosts if published else {}
    members = coordinator.members
    host_loads = coordinator.loads.host_loads(tuple(members.hosts), now_s)
    suspects = members.suspected_for(now_s)
    hosts = [
        _host(coordinator, key, member, host_loads[key]) | {"suspected": key in suspects} for key, member in sorted(members.hosts.items())
    ]
    routers = [_router(key, member.report) for key, member in sorted(members.routers.items())]
    alone = sorted(expert for expert, holders in expert_to_hosts.items() if len(holders) < 2)
    return {
        "placement": {
            "version": list(published.version) if published else None,
            "layers": _by_layer({expert: [host.replica_id for host in holders] for expert, holders in expert_to_hosts.items()}),
        },
        "epoch": coordinator.epoch,
        "hosts": hosts,
        "routers": routers,
        "load": _load(coordinator, host_loads, expert_to_hosts, now_s) | {"routers": routers},
        "standalone_experts": [list(expert) for expert in alone],
        "failure": coordinator.failure,
        "num_experts": len(coordinator.experts),
        "num_ready": coordinator.num_ready,
        "events": coordinator.log.events,
        "decisions": coordinator.log.lines,
        "operations": coordinator.operations.lines(),
        "scaling": coordinator.bounds.by_role,
        "state_store": coordinator.saving.view(),
    }


def _load(
    coordinator: "Coordinator",
    host_loads: Mapping[HostKey, Mapping[str, float]],
    expert_to_hosts: Mapping[LogicalExpert, tuple[HostKey, ...]],
    now_s: float,
) -> dict[str, Any]:
    """`expert_tokens` since the start, `tokens_per_s` over the long window; `balancedness` of hosts' tokens over the short one."""
    loads = coordinator.loads
    long_rates, short_rates = loads.experts_long.rates(now_s), loads.experts_short.rates(now_s)
    hottest = Counter(short_rates).most_common(NUM_HOTTEST)
    balance = host_balancedness(coordinator, host_loads)
    planned = coordinator.planning.last_plan
    return {
        "expert_tokens": _by_layer(loads.num_tokens),
        "tokens_per_s": _by_layer({expert: round(rate, 3) for expert, rate in long_rates.items()}),
        "hottest": [
            {
                "layer": expert.layer,
                "expert": expert.expert,
                "tokens_per_s": round(rate, 3),
                "replicas": len(expert_to_hosts.get(expert, ())),
            }
            for expert, rate in hottest
            if rate > 0
        ],
        "balancedness": None if balance is None else round(balance, 4),
        "planned_balancedness": None if planned is None else round(planned.balancedness, 4),
        "short_window_s": loads.experts_short.window_s,
        "long_window_s": loads.experts_long.window_s,
    }


def host_balancedness(coordinator: "Coordinator", host_loads: Mapping[HostKey, Mapping[str, float]]) -> float | None:
    """Of the hosts that the published map names, by their tokens over the short window; None without load."""
    published = coordinator.maps.current
    used = published.host_to_experts if published else {}
    speeds = {key: member.report.speed for key, member in coordinator.members.hosts.items()}
    return balancedness({key: load["tokens_per_s"] for key, load in host_loads.items() if used.get(key)}, speeds)


def _by_layer(values: Mapping[LogicalExpert, Any]) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for expert, value in sorted(values.items()):
        layers.setdefault(str(expert.layer), {})[str(expert.expert)] = value
    return layers


def _host(coordinator: "Coordinator", key: HostKey, member: HostMember, load: Mapping[str, float]) -> dict[str, Any]:
    report = member.report
    published = coordinator.maps.current
    return {
        "id": key.replica_id,
        "incarnation": key.incarnation,
        "node_id": report.endpoint.node_id,
        "ready": len(member.ready),
        "desired": len(coordinator.planning.desired.get(key, frozenset())),
        "published": len(published.host_to_experts.get(key, frozenset())) if published else 0,
        "loading": report.num_loading,
        "slots": report.slots,
        "expert_bytes": report.expert_bytes,
        "bytes_limit": report.bytes_limit,
        "speed": report.speed,
        "is_leaving": report.is_leaving,
        "is_drained": key in coordinator.planning.drained,
        **{name: round(value, 6) for name, value in load.items()},
        **report.stats,
    }


def _router(key: HostKey, report: RouterReport) -> dict[str, Any]:
    return {
        "id": key.replica_id,
        "incarnation": key.incarnation,
        "node_id": report.endpoint.node_id,
        "map_version": list(report.adopted) if report.adopted else None,
        "suspects": [host.replica_id for host in report.suspects],
        **report.stats,
    }
