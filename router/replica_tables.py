"""Where each expert's tokens go now: the map, the open links and what a part has met, as one table per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.host_links import HostLinks
from router.parts import NOBODY, NOT_WANTED, Part, Trouble
from router.placement_map import HostKey, MapVersion, PlacementMap
from router.replica_choice import HostCost, choose_replicas


@dataclass(frozen=True)
class LayerReplicas:
    """Who can serve a layer's E experts: host indices, the first of each as a table [E + 1], and whether there is a choice."""

    candidates: Sequence[Sequence[int]]
    table: NDArray[np.int64]
    has_choice: bool


class ReplicaTables:
    """Host indices are places in `hosts`. Tables are kept until the map or a link changes."""

    def __init__(self, links: HostLinks) -> None:
        self._links = links
        self._layers: dict[int, dict[int, tuple[HostKey, ...]]] = {}
        self._replicas: dict[int, LayerReplicas] = {}
        self._of_changes = -1
        self._version = MapVersion(0, 0)
        self.hosts: list[HostKey] = []
        self.num_experts = 0

    def adopt(self, placement: PlacementMap) -> None:
        """The map to read from now on."""
        self._version = placement.version
        self.hosts = sorted(placement.hosts)
        self.num_experts = max((expert.expert + 1 for expert in placement.expert_to_hosts), default=0)
        self._layers = {}
        for expert, hosts in placement.expert_to_hosts.items():
            self._layers.setdefault(expert.layer, {})[expert.expert] = hosts
        self._replicas.clear()

    def host_table(self, part: Part) -> NDArray[np.int64]:
        """[E + 1]: the host of each expert for this part, NOBODY where none can be reached, NOT_WANTED last."""
        replicas = self._replicas_of(part.handle.layer, part.handle.num_experts)
        if part.trouble is None and not replicas.has_choice:
            return replicas.table
        candidates = replicas.candidates
        if part.trouble is not None:
            candidates = [self._allowed(part.trouble, hosts) for hosts in candidates]
        queued = [link.num_tokens if link else 0 for link in map(self._links.get, self.hosts)]
        chosen = choose_replicas(part.counts(), candidates, queued, [HostCost()] * len(self.hosts))
        return np.array([*chosen, NOT_WANTED])

    def has_alternative(self, part: Part) -> bool:
        """Whether each of the part's experts has a host that it has neither been sent to nor avoids."""
        tried = {part.host, *(part.trouble.avoided if part.trouble else ())}
        candidates = self._replicas_of(part.handle.layer, part.handle.num_experts).candidates
        return all(
            any(self.hosts[index] not in tried for index in candidates[expert]) for expert, count in enumerate(part.counts()) if count
        )

    def _replicas_of(self, layer: int, num_experts: int) -> LayerReplicas:
        if self._of_changes != self._links.changes:
            self._replicas.clear()
            self._of_changes = self._links.changes
        known = self._replicas.get(layer)
        if known is None or len(known.candidates) != num_experts:
            index_of = {host: index for index, host in enumerate(self.hosts)}
            experts = self._layers.get(layer, {})
            candidates = [[index_of[host] for host in self._open_hosts(experts.get(expert, ()))] for expert in range(num_experts)]
            table = np.array([*(hosts[0] if hosts else NOBODY for hosts in candidates), NOT_WANTED])
            known = self._replicas[layer] = LayerReplicas(candidates, table, any(len(hosts) > 1 for hosts in candidates))
        return known

    def _open_hosts(self, hosts: Sequence[HostKey]) -> Sequence[HostKey]:
        """Those with an open channel; suspects only where there is no other."""
        open_hosts = [host for host in hosts if self._links.get(host) is not None]
        return [host for host in open_hosts if host not in self._links.suspects] or open_hosts

    def _allowed(self, trouble: Trouble, hosts: Sequence[int]) -> Sequence[int]:
        """Not those that refused under this very map; those to avoid only where there is no other."""
        allowed = [index for index in hosts if trouble.refused.get(self.hosts[index], MapVersion(-1, -1)) < self._version]
        return [index for index in allowed if self.hosts[index] not in trouble.avoided] or allowed
