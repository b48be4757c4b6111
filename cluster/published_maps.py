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
        self._needed: dict[HostKey, set[LogicalExpert]] = {}  # what the next map would name
        self._covered: frozenset[LogicalExpert] = frozenset()  # by the next map
        self.has_news = False

    @property
    def current(self) -> PlacementMap | None:
        """The newest."""
        return self._maps[-1] if self._maps else None

    def consider(
        self,
        experts: Collection[LogicalExpert],
        hosts: Mapping[HostKey, HostMember],
        desired: Mapping[HostKey, frozenset[LogicalExpert]],
        suspects: Collection[HostKey],
        min_replicas: int,
        *,
        may_publish: bool = True,
    ) -> PlacementMap | None:
        """Publishes the next map if every expert has a ready host, and it would say something new; else None.

        What hosts must keep is looked at in any case; `has_news` says whether a map is held back.

        A host that has not seen our epoch does not count: it may follow another's orders, and drop what it has just reported.
        """
        ready = {key: member.ready for key, member in hosts.items() if member.report.epoch_seen == self.epoch}
        wanted = {key: desired[key] for key in ready if key in desired}
        holders = choose_holders(experts, ready, wanted, self.current, suspects, min_replicas)
        self._covered, self._needed = frozenset(holders), {key: set() for key in ready}
        for expert, keys in holders.items():
            for key in keys:
                self._needed[key].add(expert)
        self.has_news = len(holders) == len(experts) and (self.current is None or holders != self.current.expert_to_hosts)
        if not self.has_news or not may_publish:
            return None
        self.has_news = False
        version = MapVersion(self.epoch, self._maps[-1].version.n + 1 if self._maps else 1)
        named = sorted(key for key, its in self._needed.items() if its)
        placement = PlacementMap(version, {key: hosts[key].report.endpoint for key in named}, holders)
        self._maps = [*self._maps[-NUM_KEPT + 1 :], placement]
        return placement

    def is_sound(self, hosts: Mapping[HostKey, HostMember]) -> bool:
        """Whether there is a map, and all hosts it names are alive and stay."""
        return self.current is not None and all(key in hosts and not hosts[key].report.is_leaving for key in self.current.hosts)

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
            possible = [version for version in (router.report.adopted or router.report.held, router.handed) if version is not None]
            oldest = min([oldest, *possible])
        if oldest < self._maps[0].version:
            return None
        return [placement for placement in self._maps if placement.version >= oldest]

    def kept(self, key: HostKey, ready: frozenset[LogicalExpert], in_use: Collection[PlacementMap] | None) -> frozenset[LogicalExpert]:
        """What a host must not drop: what a map in use names there, and what it holds alone, since others named may have died."""
        if in_use is None:
            return ready
        return named_by(in_use, key) | self._needed.get(key, frozenset()) | (ready - self._covered)


def named_by(maps: Iterable[PlacementMap], key: HostKey) -> frozenset[LogicalExpert]:
    """What any of these maps says that the host holds."""
    return frozenset[LogicalExpert]().union(*(placement.host_to_experts.get(key, frozenset()) for placement in maps))


def choose_holders(
    experts: Iterable[LogicalExpert],
    ready: Mapping[HostKey, frozenset[LogicalExpert]],
    desired: Mapping[HostKey, frozenset[LogicalExpert]],
    published: PlacementMap | None,
    suspects: Collection[HostKey],
    min_replicas: int,
) -> dict[LogicalExpert, tuple[HostKey, ...]]:
    """The hosts to name for each expert, sorted: those that shall hold it and do. Without the experts that have no ready host.

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
            continue
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
