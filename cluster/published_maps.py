"""The map that is published, the ones before it that somebody may still use, and what hosts must keep because of them."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from cluster.members import HostMember, RouterMember
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion, PlacementMap

NUM_KEPT = 32  # older maps are forgotten: a router that may still use one keeps every host from dropping anything


class PublishedMaps:
    """Of one epoch. `current` is None until every expert had a ready host."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._maps: list[PlacementMap] = []

    @property
    def current(self) -> PlacementMap | None:
        """The newest."""
        return self._maps[-1] if self._maps else None

    def publish(self, holders: Mapping[LogicalExpert, tuple[HostKey, ...]], hosts: Mapping[HostKey, HostMember]) -> PlacementMap:
        """The next version: `holders` of every expert, each of them in `hosts`."""
        version = MapVersion(self.epoch, self._maps[-1].version.n + 1 if self._maps else 1)
        named = sorted({host for keys in holders.values() for host in keys})
        placement = PlacementMap(version, {key: hosts[key].report.endpoint for key in named}, dict(holders))
        self._maps = [*self._maps[-NUM_KEPT + 1 :], placement]
        return placement

    def forget_unused(self, routers: Iterable[RouterMember]) -> None:
        """Lets go of the maps that nobody uses or can come to use."""
        in_use = self.in_use(routers)
        if in_use is not None:
            self._maps = in_use

    def in_use(self, routers: Iterable[RouterMember]) -> list[PlacementMap] | None:
        """The published map and those that a router may use or come to use; None if one of them is not known here."""
        if not self._maps:
            return None
        oldest = self._maps[-1].version
        for router in routers:
            report = router.report
            possible = [version for version in (report.adopted or report.held, router.handed) if version is not None]
            oldest = min([oldest, *possible])
        if oldest < self._maps[0].version:
            return None
        return [placement for placement in self._maps if placement.version >= oldest]

    def named(self, key: HostKey, in_use: Collection[PlacementMap]) -> frozenset[LogicalExpert]:
        """What any map in use says that this host holds."""
        return frozenset().union(*(placement.host_to_experts.get(key, frozenset()) for placement in in_use))


def choose_holders(
    experts: Iterable[LogicalExpert],
    ready: Mapping[HostKey, frozenset[LogicalExpert]],
    desired: Mapping[HostKey, frozenset[LogicalExpert]],
    published: PlacementMap | None,
    suspects: Collection[HostKey],
    min_replicas: int,
) -> dict[LogicalExpert, tuple[HostKey, ...]] | None:
    """The hosts to name for each expert, sorted: those that shall hold it and do. None if an expert has no ready host at all.

    While those are fewer than shall be, at most min_replicas, or cannot all be reached, others that still hold it fill up: first
    those that can be reached, then those named already. So a replica is never given up before another stands in its place.
    """
    holders: dict[LogicalExpert, list[HostKey]] = {}
    for key in sorted(ready):
        for expert in ready[key]:
            holders.setdefault(expert, []).append(key)
    num_desired = Counter(expert for wanted in desired.values() for expert in wanted)
    chosen: dict[LogicalExpert, tuple[HostKey, ...]] = {}
    for expert in experts:
        present = holders.get(expert)
        if not present:
            return None
        wanted = [key for key in present if expert in desired.get(key, ())]
        num_needed = max(1, min(min_replicas, num_desired[expert]))
        if len(wanted) == len(present) or sum(key not in suspects for key in wanted) >= num_needed:
            chosen[expert] = tuple(wanted)
            continue
        before = published.expert_to_hosts.get(expert, ()) if published else ()
        others = [key for key in present if key not in wanted and not (wanted and key in suspects)]
        others.sort(key=lambda key: (key in suspects, key not in before))
        num_missing = num_needed - sum(key not in suspects for key in wanted)
        chosen[expert] = tuple(sorted([*wanted, *others[:num_missing]]))
    return chosen
