"""What a step costs the expert hosts: placements by the product's planner, replicas by its choice, on the recorded routing."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.placement import HostCapacity, PlannerSettings, plan
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey
from router.replica_choice import Costs, HostCost, Replicas, share_tokens
from tests.benchmarks.elasticity.constants import Constants

BATCHES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS_SAMPLED = 6
Desired = Mapping[HostKey, frozenset[LogicalExpert]]


@dataclass(frozen=True)
class StepCost:
    """[max_batch_tokens + 1]: seconds of the busiest host, layer by layer, and of the mean host, for a frame of so many tokens."""

    busiest_s: NDArray[np.float64]
    mean_s: NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What it takes to get from one number of hosts to another: the longest load of any host, in bytes."""

    most_bytes: int


class ExpertHosts:
    """`traces`: topic -> chosen experts [tokens, layers, top_k]. Plans see the first half of a trace, costs are of the second."""

    def __init__(self, constants: Constants, traces: Mapping[str, NDArray[np.uint8]]) -> None:
        self._constants = constants
        self._traces = traces
        model = constants.model
        self._experts = [LogicalExpert(layer, expert) for layer in range(model.num_layers) for expert in range(model.num_experts)]
        self._settings = PlannerSettings(min_replicas=constants.placement.min_replicas, redundancy=constants.placement.redundancy)
        self.slots = constants.device.memory_bytes // model.expert_bytes
        self.placement = cache(self._placement)
        self.cost = cache(self._cost)
        self.change = cache(self._change)
        self._loads = {topic: self._count(ids[: len(ids) // 2]) for topic, ids in traces.items()}

    @property
    def num_experts(self) -> int:
        return len(self._experts)

    def _count(self, ids: NDArray[np.uint8]) -> dict[LogicalExpert, float]:
        counts = [np.bincount(ids[:, layer].ravel(), minlength=self._constants.model.num_experts) for layer in range(ids.shape[1])]
        return {expert: float(counts[expert.layer][expert.expert]) for expert in self._experts}

    def _capacities(self, num_hosts: int) -> dict[HostKey, HostCapacity]:
        return {HostKey(f"host-{n:02}", 1): HostCapacity(f"node-{n:02}", slots=self.slots) for n in range(num_hosts)}

    def _placement(self, num_hosts: int, topic: str) -> Desired:
        return self._plan(num_hosts, topic, {}).desired

    def _plan(self, num_hosts, topic, present):
        capacities = self._capacities(num_hosts)
        leaving = frozenset(present) - frozenset(capacities)
        hosts = capacities | {host: HostCapacity(host.replica_id, slots=self.slots) for host in leaving}
        return plan(self._experts, hosts, present, self._loads[topic], self._constants.model.expert_bytes, self._settings, draining=leaving)

    def _change(self, before: int, after: int, topic: str) -> Change:
        moved: dict[HostKey, int] = {}
        for move in self._plan(after, topic, self.placement(before, topic)).moves:
            moved[move.host] = moved.get(move.host, 0) + move.num_bytes
        return Change(max(moved.values(), default=0))

    def _cost(self, num_hosts: int, planned_for: str, topic: str) -> StepCost:
        """Means over frames drawn from the second half of the trace; other sizes are interpolated."""
        desired = self.placement(num_hosts, planned_for)
        ids = self._traces[topic]
        ids = ids[len(ids) // 2 :]
        device, model = self._constants.device, self._constants.model
        random = np.random.default_rng(num_hosts)
        layers = np.linspace(0, model.num_layers - 1, LAYERS_SAMPLED).astype(int)
        busiest, mean = np.zeros(len(BATCHES)), np.zeros(len(BATCHES))
        order = sorted(desired)
        replicas = {layer: _replicas(desired, order, layer, model.num_experts) for layer in layers}
        costs = Costs.of([HostCost(device.alpha_s, device.beta_s)] * num_hosts)
        for place, size in enumerate(BATCHES[1:], start=1):
            repeats = 1 if size >= 128 else 2
            for layer in layers:
                for _ in range(repeats):
                    chosen = ids[random.integers(0, len(ids), size), layer]
                    counts = np.bincount(chosen.ravel(), minlength=model.num_experts)
                    times = _host_times(counts, replicas[layer], costs)
                    busiest[place] += times.max() / repeats
                    mean[place] += times.mean() / repeats
        scale = model.num_layers / LAYERS_SAMPLED
        sizes = np.arange(self._constants.engine.max_batch_tokens + 1)
        return StepCost(np.interp(sizes, BATCHES, busiest * scale), np.interp(sizes, BATCHES, mean * scale))


def _replicas(desired: Desired, order: list[HostKey], layer: int, num_experts: int) -> Replicas:
    """Of one layer's experts; hosts are places in `order`."""
    experts = [LogicalExpert(layer, expert) for expert in range(num_experts)]
    return Replicas.of([[place for place, host in enumerate(order) if expert in desired[host]] for expert in experts])


def _host_times(counts: NDArray[np.int64], replicas: Replicas, costs: Costs) -> NDArray[np.float64]:
    """[hosts]: seconds, as the product's replica choice splits a frame with `counts` tokens for each expert."""
    num_hosts = len(costs.per_expert)
    shares = share_tokens(counts, replicas, np.zeros(num_hosts), costs)
    tokens = np.bincount(replicas.holders, weights=shares, minlength=num_hosts)
    activated = np.bincount(replicas.holders, weights=shares > 0, minlength=num_hosts)
    return costs.per_expert * activated + costs.per_token * tokens


def read_traces(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Topic -> chosen experts [tokens, layers, top_k]."""
    return {topic: np.load(folder / f"{topic}.npz")["expert_ids"] for topic in ("law", "translation")}
