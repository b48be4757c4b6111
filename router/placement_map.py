"""The one value that the two loops share: which hosts hold each logical expert, ready to serve."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

from model.logical_expert import LogicalExpert
from router.errors import FrameError


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
    """Where a process listens. Same node id: the abstract Unix socket; otherwise TCP.

    A host says here what it has measured: the seconds that an activated expert takes it, and a token of one; 0 while unknown.
    """

    node_id: str
    unix_name: str  # abstract name, without the leading NUL
    tcp_host: str
    tcp_port: int
    alpha_s: float = 0.0
    beta_s: float = 0.0


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

    def is_complete(self, experts: Iterable[LogicalExpert]) -> bool:
        """Whether each of `experts` has a ready host here."""
        return all(self.expert_to_hosts.get(expert) for expert in experts)

    def uncovers(self, old: "PlacementMap") -> frozenset[LogicalExpert]:
        """The experts that `old` reaches and this map does not: empty for a map that a router may adopt."""
        return frozenset(expert for expert, hosts in old.expert_to_hosts.items() if hosts and not self.expert_to_hosts.get(expert))

    def to_wire(self) -> dict[str, Any]:
        """Strings, numbers and lists only: for msgpack, JSON and pickle alike. Hosts are named by their place in the list."""
        place = {host: index for index, host in enumerate(self.hosts)}
        return {
            "version": list(self.version),
            "hosts": [
                [*host, end.node_id, end.unix_name, end.tcp_host, end.tcp_port, end.alpha_s, end.beta_s] for host, end in self.hosts.items()
            ],
            "experts": [[*expert, [place[host] for host in hosts]] for expert, hosts in self.expert_to_hosts.items()],
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Self:
        """The map that `to_wire` wrote; FrameError if it is not one."""
        try:
            version = MapVersion(*(_number(value) for value in wire["version"]))
            hosts = {_host(entry): _endpoint(entry) for entry in wire["hosts"]}
            keys = tuple(hosts)
            expert_to_hosts = {
                LogicalExpert(_number(layer), _number(expert)): tuple(keys[_number(place)] for place in places)
                for layer, expert, places in wire["experts"]
            }
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FrameError(f"not a placement map: {type(error).__name__}: {error}") from error
        return cls(version, hosts, expert_to_hosts)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} stands where a number belongs")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} stands where seconds belong")
    return float(value)


def _host(entry: list[Any]) -> HostKey:
    replica_id, incarnation, *_ = entry
    return HostKey(str(replica_id), _number(incarnation))


def _endpoint(entry: list[Any]) -> Endpoint:
    _, _, node_id, unix_name, tcp_host, tcp_port, alpha_s, beta_s = entry
    return Endpoint(str(node_id), str(unix_name), str(tcp_host), _number(tcp_port), _seconds(alpha_s), _seconds(beta_s))
