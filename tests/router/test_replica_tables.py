"""Which host each choice of a part is sent to, by map, links and what the part has met."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from model.logical_expert import LogicalExpert
from router.grouping import NOBODY, NOT_WANTED
from router.parts import Part
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.replica_tables import ReplicaTables

HOSTS = [HostKey(f"host-{index}", 1) for index in range(3)]


@dataclass
class Links:
    """As HostLinks: tokens under way to the hosts that have an open channel."""

    num_tokens: dict[HostKey, int]
    suspects: frozenset[HostKey] = frozenset()
    changes: int = 0

    def get(self, host: HostKey) -> Any:
        return SimpleNamespace(num_tokens=self.num_tokens[host]) if host in self.num_tokens else None


@dataclass
class Case:
    holders: list[list[int]]
    alpha_beta_s: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)] * len(HOSTS))
    links: Links = field(default_factory=lambda: Links(dict.fromkeys(HOSTS, 0)))

    def __post_init__(self) -> None:
        endpoints = {host: Endpoint("node", "", "", 1, *costs) for host, costs in zip(HOSTS, self.alpha_beta_s, strict=True)}
        expert_to_hosts = {LogicalExpert(1, expert): tuple(HOSTS[host] for host in held) for expert, held in enumerate(self.holders)}
        self.tables = ReplicaTables(self.links)
        self.tables.adopt(PlacementMap(MapVersion(1, 1), endpoints, expert_to_hosts))

    def part(self, ids: list[list[int]]) -> Part:
        hidden, expert_ids = torch.zeros(len(ids), 4), torch.tensor(ids, dtype=torch.int16)
        handle: Any = SimpleNamespace(layer=1, num_experts=len(self.holders))
        return Part(handle, None, hidden, expert_ids, torch.ones(expert_ids.shape))

    def hosts_of(self, ids: list[list[int]]) -> list[list[int]]:
        return self.tables.host_table(self.part(ids)).tolist()


def test_without_a_choice_the_only_host():
    assert Case([[0], [2], []]).hosts_of([[0, 1], [1, 2], [-1, 0]]) == [[0, 2], [2, NOBODY], [NOT_WANTED, 0]]


def test_tokens_of_one_expert_are_split_over_idle_hosts():
    case = Case([[0, 1], [2]])
    hosts = np.array(case.hosts_of([[0, 1]] * 100))
    assert (hosts[:, 1] == 2).all()
    assert np.bincount(hosts[:, 0]).tolist() == [50, 50]
    case.links.num_tokens[HOSTS[0]] = 100
    assert np.bincount(np.array(case.hosts_of([[0, 1]] * 100))[:, 0], minlength=2).tolist() == [0, 100]


def test_a_host_is_charged_what_it_has_measured_and_the_mean_of_the_others_where_it_has_not():
    hosts = Case([[0, 1]], [(0.001, 0.003), (0.001, 0.001), (0.0, 0.0)]).hosts_of([[0]] * 100)
    assert np.bincount(np.array(hosts).ravel()).tolist() == [25, 75]
    hosts = Case([[1, 2]], [(0.001, 0.003), (0.001, 0.001), (0.0, 0.0)]).hosts_of([[0]] * 99)
    assert np.bincount(np.array(hosts).ravel()).tolist() == [0, 66, 33]


def test_closed_suspected_and_avoided_hosts_only_where_there_is_no_other():
    case = Case([[0, 1], [0]])
    case.links.suspects, case.links.changes = frozenset({HOSTS[0]}), 1
    assert case.hosts_of([[0, 1]]) == [[1, 0]]
    del case.links.num_tokens[HOSTS[0]]
    case.links.changes = 2
    assert case.hosts_of([[0, 1]]) == [[1, NOBODY]]

    case = Case([[0, 1], [0]])
    part = case.part([[0, 1]])
    part.met("slow").avoided.add(HOSTS[0])
    assert case.tables.host_table(part).tolist() == [[1, 0]]
    part.met("not there").refused[HOSTS[0]] = MapVersion(1, 1)
    assert case.tables.host_table(part).tolist() == [[1, NOBODY]]
