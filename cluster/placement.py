"""Which host should hold which expert: a pure plan of one replica each, that moves nothing that may stay."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

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


def plan(
    experts: Sequence[LogicalExpert],
    hosts: Mapping[HostKey, int | None],
    present: Mapping[HostKey, frozenset[LogicalExpert]],
) -> dict[HostKey, frozenset[LogicalExpert]]:
    """Every expert on exactly one host; `hosts` gives each host's slots, None for no limit.

    An expert stays where it is present and that host lives (on several: on the one with fewest of its layer); the others go,
    layer by layer, to the host with fewest experts of their layer, then with fewest in all, then first by name. The same
    arguments in any order give the same plan. Raises NotEnoughSlots.
    """
    wanted = sorted(set(experts))
    placing = _Placing(hosts)
    holders: dict[LogicalExpert, list[HostKey]] = defaultdict(list)
    for host in placing.order:
        for expert in present.get(host, ()):
            holders[expert].append(host)
    # Experts with one holder first: those with several can then go where there is room left.
    fewest_holders_first = sorted(wanted, key=lambda expert: len(holders[expert]))
    orphans = [expert for expert in fewest_holders_first if not placing.place(expert, holders[expert])]
    missing = [expert for expert in sorted(orphans) if not placing.place(expert, placing.order)]
    if missing:
        limited = sum(slots for slots in hosts.values() if slots is not None)
        raise NotEnoughSlots(len(wanted), len(hosts), limited, missing)
    return {host: frozenset(placing.held[host]) for host in placing.order}


class _Placing:
    """A plan in the making: what each host holds so far."""

    def __init__(self, hosts: Mapping[HostKey, int | None]) -> None:
        self.order = sorted(hosts)
        self.held: dict[HostKey, list[LogicalExpert]] = {host: [] for host in self.order}
        self._slots = hosts
        self._of_layer: Counter[tuple[HostKey, int]] = Counter()

    def place(self, expert: LogicalExpert, candidates: Sequence[HostKey]) -> bool:
        """Puts the expert on the least loaded candidate with a free slot; False if there is none."""
        free = [host for host in candidates if self._has_room(host)]
        if not free:
            return False
        host = min(free, key=lambda host: (self._of_layer[host, expert.layer], len(self.held[host])))
        self.held[host].append(expert)
        self._of_layer[host, expert.layer] += 1
        return True

    def _has_room(self, host: HostKey) -> bool:
        slots = self._slots[host]
        return slots is None or len(self.held[host]) < slots
