"""Which hosts should hold which expert: a pure plan from loads, hosts and what is present."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey


class NotEnoughSlots(ClusterError):
    """Names how many experts there are, how many slots, and which experts stay without one."""

    kind = "not_enough_slots"

    def __init__(self, num_experts: int, num_hosts: int, num_slots: int, missing: Sequence[LogicalExpert]) -> None:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        super().__init__(
            f"{num_experts} experts do not fit the {num_slots} slots of {num_hosts} expert hosts: no place for {named}{more}; "
            "start more expert hosts or give each more slots"
        )
        self.missing = tuple(missing)


@dataclass(frozen=True)
class HostCapacity:
    """What a host can carry: `slots` over all layers and `bytes` of weights (None: no limit), `speed` relative to other hosts."""

    node_id: str
    slots: int | None = None
    bytes: int | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class PlannerSettings:
    """`redundancy` is the replicas of a layer beyond min_replicas of each expert, as a share of its experts: 0.25 of 64 are 16.

    A layer's replicas move for balance only where its balancedness gains min_gain + min_gain_per_gib x GiB to load.
    """

    min_replicas: int = 1
    redundancy: float = 0.0
    min_gain: float = 0.01
    min_gain_per_gib: float = 0.05


@dataclass(frozen=True)
class Move:
    """One expert to load on a host; what to drop follows from the plan."""

    expert: LogicalExpert
    host: HostKey
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """`desired` names every host. `missing_replicas`: experts with fewer than min_replicas because hosts are too few or too full."""

    desired: dict[HostKey, frozenset[LogicalExpert]]
    moves: tuple[Move, ...]
    balancedness_before: float
    balancedness: float
    missing_replicas: int
    reason: str


def plan(
    experts: Sequence[LogicalExpert],
    hosts: Mapping[HostKey, HostCapacity],
    present: Mapping[HostKey, frozenset[LogicalExpert]],
    loads: Mapping[LogicalExpert, float],
    expert_bytes: int | Mapping[LogicalExpert, int],
    settings: PlannerSettings,
    draining: frozenset[HostKey] = frozenset(),
    force: bool = False,
) -> Plan:
    """Every expert on at least one host that does not drain, on min_replicas where there are that many.

    The same arguments in any order give the same plan. Raises NotEnoughSlots.
    """
    wanted = sorted(set(experts))
    placing = _Placing({host: capacity for host, capacity in hosts.items() if host not in draining})
    holders: dict[LogicalExpert, list[HostKey]] = defaultdict(list)
    for host in placing.order:
        for expert in present.get(host, ()):
            holders[expert].append(host)
    # Experts with one holder first: those with several can then go where there is room left.
    fewest_holders_first = sorted(wanted, key=lambda expert: len(holders[expert]))
    orphans = [expert for expert in fewest_holders_first if not placing.place(expert, holders[expert])]
    missing = [expert for expert in sorted(orphans) if not placing.place(expert, placing.order)]
    if missing:
        limited = sum(hosts[host].slots or 0 for host in placing.order)
        raise NotEnoughSlots(len(wanted), len(placing.order), limited, missing)
    short: set[LogicalExpert] = set()
    for _ in range(1, settings.min_replicas):
        for expert in fewest_holders_first:
            if not (placing.place(expert, holders[expert]) or placing.place(expert, placing.order)):
                short.add(expert)
    desired = {host: frozenset(placing.held.get(host, ())) for host in sorted(hosts)}
    moves = tuple(
        Move(expert, host, expert_bytes if isinstance(expert_bytes, int) else expert_bytes[expert], "has too few replicas")
        for host, held in desired.items()
        for expert in sorted(held - present.get(host, frozenset()))
    )
    before, after = (_balancedness(held, placing.order, hosts, loads) for held in (present, desired))
    return Plan(desired, moves, before, after, len(short), f"{len(moves)} replicas to load")


def _balancedness(
    held: Mapping[HostKey, Collection[LogicalExpert]],
    order: Sequence[HostKey],
    hosts: Mapping[HostKey, HostCapacity],
    loads: Mapping[LogicalExpert, float],
) -> float:
    """Mean host load / busiest host load over layers with any load, load split evenly over replicas."""
    replicas = Counter(expert for host in order for expert in held.get(host, ()))
    layers: dict[int, dict[HostKey, float]] = defaultdict(lambda: dict.fromkeys(order, 0.0))
    for host in order:
        for expert in sorted(held.get(host, ())):
            layers[expert.layer][host] += loads.get(expert, 0.0) / replicas[expert] / hosts[host].speed
    each = [sum(times.values()) / len(times) / max(times.values()) for times in layers.values() if any(times.values())]
    return sum(each) / len(each) if each else 1.0


class _Placing:
    """A plan in the making: what each host holds so far."""

    def __init__(self, hosts: Mapping[HostKey, HostCapacity]) -> None:
        self.order = sorted(hosts)
        self.held: dict[HostKey, list[LogicalExpert]] = {host: [] for host in self.order}
        self._hosts = hosts
        self._of_layer: Counter[tuple[HostKey, int]] = Counter()
        self._nodes: dict[LogicalExpert, set[str]] = defaultdict(set)

    def place(self, expert: LogicalExpert, candidates: Sequence[HostKey]) -> bool:
        """Puts the expert on the least loaded candidate with a free slot, on a new node if it can; False if there is none."""
        free = [host for host in candidates if self._has_room(host) and expert not in self.held[host]]
        if not free:
            return False
        nodes = self._nodes[expert]
        host = min(free, key=lambda host: (self._hosts[host].node_id in nodes, self._of_layer[host, expert.layer], len(self.held[host])))
        self.held[host].append(expert)
        nodes.add(self._hosts[host].node_id)
        self._of_layer[host, expert.layer] += 1
        return True

    def _has_room(self, host: HostKey) -> bool:
        slots = self._hosts[host].slots
        return slots is None or len(self.held[host]) < slots
