"""Which hosts should hold which expert: a pure plan from loads, hosts and what is present."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ClusterError
from cluster.placement_arrays import UNLIMITED, Bools, Fleet, Model, Reasons, holds_of, model_of, wanted_of
from cluster.placement_balance import EVEN_PART, Price, balance, balancedness
from cluster.placement_repair import BALANCE, OTHER_NODE, SPARE, TOO_FEW, repair
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

_REASONS = {TOO_FEW: "too few replicas", OTHER_NODE: "replica on another node", SPARE: "spare copy", BALANCE: "balance"}
_GIB = 1 << 30


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

    Hysteresis: replicas of a layer move for balance only if its balancedness gains at least
    `min_gain` + `min_gain_per_layer` x (bytes to load / bytes of all the layer's replicas).
    """

    min_replicas: int = 1
    redundancy: float = 0.0
    min_gain: float = 0.01
    min_gain_per_layer: float = 0.3


@dataclass(frozen=True)
class Move:
    """One expert to load on a host; what to drop follows from the plan."""

    expert: LogicalExpert
    host: HostKey
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """`desired` names every host. `missing_replicas`: experts with fewer than min_replicas because hosts are too few or too full.

    Balancedness, over layers that have load: the time of a layer if all hosts shared it by their speed, over the busiest host's.
    Half of an expert's load counts as split evenly over its replicas, half as put where replica choice finds room.
    """

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
    noise: Mapping[int, float] | None = None,
) -> Plan:
    """Every expert on min_replicas hosts that do not drain, on different nodes where there are, and as many copies of the hot.

    `present` replicas stay unless their host is too full, they are copies too many, or moving them is worth its bytes (see
    PlannerSettings; `noise` is what a layer must gain besides, by its number; `force` takes any gain). Without loads nothing moves that
    may stay, and the rest is spread evenly. The same arguments in any order give the same plan. Raises NotEnoughSlots.
    """
    wanted_experts, order = sorted(set(experts)), sorted(hosts)
    if not wanted_experts:
        return Plan({host: frozenset() for host in order}, (), 1.0, 1.0, 0, "a model without routed experts")
    everyone, fleet = _fleet(hosts, frozenset()), _fleet(hosts, draining)
    model, has_load = model_of(wanted_experts, loads, expert_bytes)
    origin = holds_of(wanted_experts, order, present)
    holds, why = origin.copy(), np.zeros(origin.shape, dtype=np.int8)
    if order:
        wanted = wanted_of(model, fleet, settings.min_replicas, settings.redundancy)
        repair(model, fleet, wanted, holds, why)
        layers, noise = sorted({expert.layer for expert in wanted_experts}), noise or {}
        floors = np.array([0.0 if force else settings.min_gain + noise.get(layer, 0.0) for layer in layers])
        price = Price(0.0 if force else settings.min_gain_per_layer, floors)
        balance(model, fleet, wanted, holds, origin, why, has_load, price, EVEN_PART)
    replicas = holds.sum(axis=1)
    if not replicas.all():
        num_slots = int(np.minimum(fleet.slots, fleet.bytes // max(int(model.sizes.max()), 1)).sum())
        missing = [wanted_experts[index] for index in np.flatnonzero(replicas == 0)]
        raise NotEnoughSlots(len(wanted_experts), len(hosts.keys() - draining), num_slots, missing)
    moves = _moves(wanted_experts, order, model, holds & ~origin, why)
    before, after = _mean_balancedness(model, everyone, origin, has_load), _mean_balancedness(model, fleet, holds, has_load)
    short = int((replicas < settings.min_replicas).sum())
    desired = {}
    for place, host in enumerate(order):
        desired[host] = frozenset([wanted_experts[index] for index in np.flatnonzero(holds[:, place]).tolist()])
    return Plan(desired, moves, before, after, short, _reason(moves, before, after, short, settings, len(draining & hosts.keys())))


def prepare() -> None:
    """Compiles the planner: seconds the first time on a machine, milliseconds after; before anybody waits for a plan."""
    host, expert = HostKey("", 0), LogicalExpert(0, 0)
    plan([expert], {host: HostCapacity("")}, {}, {expert: 1.0}, 0, PlannerSettings())


def _fleet(hosts: Mapping[HostKey, HostCapacity], draining: frozenset[HostKey]) -> Fleet:
    """In the order of the hosts' keys; those that drain take nothing."""
    order = sorted(hosts)
    capacities = [hosts[host] for host in order]
    nodes = {node: index for index, node in enumerate(sorted({capacity.node_id for capacity in capacities}))}
    slots = [0 if host in draining else UNLIMITED if hosts[host].slots is None else hosts[host].slots for host in order]
    return Fleet(
        np.array(slots, dtype=np.int64),
        np.array([UNLIMITED if capacity.bytes is None else capacity.bytes for capacity in capacities], dtype=np.int64),
        np.array([capacity.speed for capacity in capacities], dtype=np.float64),
        np.array([nodes[capacity.node_id] for capacity in capacities], dtype=np.int64),
    )


def _mean_balancedness(model: Model, fleet: Fleet, holds: Bools, has_load: Bools) -> float:
    """Over the layers with load; hosts that take nothing do not count."""
    takes = fleet.slots > 0
    if not has_load.any() or not takes.any():
        return 1.0
    taking = Fleet(fleet.slots[takes], fleet.bytes[takes], fleet.speeds[takes], fleet.nodes[takes])
    return float(balancedness(model, taking, np.ascontiguousarray(holds[:, takes]), EVEN_PART)[has_load].mean())


def _moves(experts: Sequence[LogicalExpert], hosts: Sequence[HostKey], model: Model, is_new: Bools, why: Reasons) -> tuple[Move, ...]:
    """By host, then by expert."""
    places, indices = np.nonzero(is_new.T)
    sizes, reasons = model.sizes[indices].tolist(), why[indices, places].tolist()
    return tuple(
        Move(experts[index], hosts[place], size, _REASONS[reason])
        for index, place, size, reason in zip(indices.tolist(), places.tolist(), sizes, reasons, strict=True)
    )


def _reason(moves: Sequence[Move], before: float, after: float, short: int, settings: PlannerSettings, num_draining: int) -> str:
    """One line for a person."""
    parts = [f"{num_draining} hosts drain"] if num_draining else []
    nums = Counter([move.reason for move in moves])
    parts += [f"{nums[reason]} to load for {reason}" for reason in _REASONS.values() if nums[reason]]
    if moves:
        num_bytes = sum([move.num_bytes for move in moves])
        parts.append(f"{num_bytes / _GIB:.2f} GiB in all, balancedness {before:.3f} to {after:.3f}")
    else:
        parts.append(f"nothing to load: no change is worth its bytes at balancedness {after:.3f}")
    if short:
        parts.append(f"{short} experts have fewer than {settings.min_replicas} replicas")
    return "; ".join(parts)
