"""The one value that the two loops share: which hosts hold each logical expert, ready to serve."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from model.experts import LogicalExpert


class MapVersion(NamedTuple):
    """Total order over all maps: a Coordinator's epoch, then its count."""

    epoch: int
    n: int


class HostKey(NamedTuple):
    """A host is its replica id and its incarnation: one process's life."""

    replica_id: str
    incarnation: int


@dataclass(frozen=True)
class Endpoint:
    """Where a process listens. Same node id: the abstract Unix socket; otherwise TCP."""

    node_id: str
    unix_name: str  # abstract name, without the leading NUL
    tcp_host: str
    tcp_port: int


@dataclass(frozen=True)
class PlacementMap:
    """Immutable. `expert_to_hosts` names every logical expert of the model, each with at least one ready host."""

    version: MapVersion
    hosts: dict[HostKey, Endpoint]
    expert_to_hosts: dict[LogicalExpert, tuple[HostKey, ...]]

    @cached_property
    def host_to_experts(self) -> dict[HostKey, frozenset[LogicalExpert]]:
        """The map read the other way round."""
        held: dict[HostKey, set[LogicalExpert]] = {host: set() for host in self.hosts}
        for expert, hosts in self.expert_to_hosts.items():
            for host in hosts:
                held[host].add(expert)
        return {host: frozenset(experts) for host, experts in held.items()}
