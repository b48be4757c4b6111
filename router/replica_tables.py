"""Where each token's experts are asked for now: by the map, the open links and what a part has met."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.grouping import NOBODY, NOT_WANTED
from router.host_links import HostLinks
from router.parts import Part, Trouble
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.replica_choice import Costs, HostCost, Replicas, hosts_of_choices, prepare, share_tokens


@dataclass(frozen=True)
class LayerReplicas:
    """Who can serve a layer's E experts: host indices, the first of each as a table [E + 1], and whether there is a choice.

    The table's last entry, which the id -1 finds, is NOT_WANTED.
    """

    candidates: Sequence[Sequence[int]]
    table: NDArray[np.int64]
    has_choice: bool
    replicas: Replicas


class ReplicaTables:
    """Host indices are places in `hosts`. Tables are kept until the map or a link changes."""

    def __init__(self, links: HostLinks) -> None:
        prepare()
        self._links = links
        self._layers: dict[int, dict[int, tuple[HostKey, ...]]] = {}
        self._replicas: dict[int, LayerReplicas] = {}
        self._of_changes = -1
        self.version = MapVersion(0, 0)
        self.hosts: list[HostKey] = []
        self._costs = Costs.of([])
        self.num_experts = 0

    def adopt(self, placement: PlacementMap) -> None:
        """The map to read from now on."""
        self.version = placement.version
        self.hosts = sorted(placement.hosts)
        self._costs = _costs([placement.hosts[host] for host in self.hosts])
        self.num_experts = max((expert.expert + 1 for expert in placement.expert_to_hosts), default=0)
        self._layers = {}
        for expert, hosts in placement.expert_to_hosts.items():
            self._layers.setdefault(expert.layer, {})[expert.expert] = hosts
        self._replicas.clear()

    def host_table(self, part: Part) -> NDArray[np.int64]:
        """[T, K]: the host of each of the part's choices, NOBODY where none can be reached, NOT_WANTED for the id -1."""
        known = self.replicas_of(part.handle.layer, part.handle.num_experts)
        ids: NDArray[np.int16] = part.expert_ids.numpy()
        if part.trouble is not None:
            known = _layer_replicas([self._allowed(part.trouble, hosts) for hosts in known.candidates])
        return self.choose(known, ids, part.handle.num_experts) if known.has_choice else known.table[ids]

    def choose(self, known: LayerReplicas, ids: NDArray[np.int16], num_experts: int) -> NDArray[np.int64]:
        """The same where there is a choice: what the hosts have to do counts."""
        queued = np.array([link.num_tokens if link else 0 for link in map(self._links.get, self.hosts)], dtype=np.float64)
        counts = np.bincount(ids.ravel() + 1, minlength=num_experts + 1)[1:]
        shares = share_tokens(counts, known.replicas, queued, self._costs)
        hosts: NDArray[np.int64] = hosts_of_choices(ids, shares, known.replicas, len(self.hosts), NOBODY, NOT_WANTED)
        return hosts

    def has_alternative(self, part: Part) -> bool:
        """Whether each of the part's experts has a host that it has neither been sent to nor avoids."""
        tried = {part.host, *(part.trouble.avoided if part.trouble else ())}
        candidates = self.replicas_of(part.handle.layer, part.handle.num_experts).candidates
        return all(
            any(self.hosts[index] not in tried for index in candidates[expert]) for expert, count in enumerate(part.counts()) if count
        )

    def replicas_of(self, layer: int, num_experts: int) -> LayerReplicas:
        """Who can serve the layer now."""
        if self._of_changes != self._links.changes:
            self._replicas.clear()
            self._of_changes = self._links.changes
        known = self._replicas.get(layer)
        if known is None or len(known.candidates) != num_experts:
            index_of = {host: index for index, host in enumerate(self.hosts)}
            experts = self._layers.get(layer, {})
            candidates = [[index_of[host] for host in self._open_hosts(experts.get(expert, ()))] for expert in range(num_experts)]
            known = self._replicas[layer] = _layer_replicas(candidates)
        return known

    def _open_hosts(self, hosts: Sequence[HostKey]) -> Sequence[HostKey]:
        """Those with an open channel; suspects only where there is no other."""
        open_hosts = [host for host in hosts if self._links.get(host) is not None]
        return [host for host in open_hosts if host not in self._links.suspects] or open_hosts

    def _allowed(self, trouble: Trouble, hosts: Sequence[int]) -> Sequence[int]:
        """Not those that refused under this very map; those to avoid only where there is no other."""
        allowed = [index for index in hosts if trouble.refused.get(self.hosts[index], MapVersion(-1, -1)) < self.version]
        return [index for index in allowed if self.hosts[index] not in trouble.avoided] or allowed


def _costs(endpoints: Sequence[Endpoint]) -> Costs:
    """What the hosts have measured; one that has not is taken for the mean of those that have."""
    known = [HostCost(end.alpha_s, end.beta_s) for end in endpoints if end.alpha_s or end.beta_s]
    usual = HostCost(*(sum(column) / len(known) for column in zip(*known, strict=True))) if known else HostCost()
    return Costs.of([HostCost(end.alpha_s, end.beta_s) if end.alpha_s or end.beta_s else usual for end in endpoints])


def _layer_replicas(candidates: Sequence[Sequence[int]]) -> LayerReplicas:
    table = np.array([*(hosts[0] if hosts else NOBODY for hosts in candidates), NOT_WANTED])
    return LayerReplicas(candidates, table, any(len(hosts) > 1 for hosts in candidates), Replicas.of(candidates))
