"""Planner and replica choice replayed on the expert traces: each window of 512 tokens under a plan made from earlier windows only.

    python -m tests.benchmarks.placement_replay [--write]

26 layers of 64 experts on 8 hosts. Sides: the experts in order and once each; a plan as DeepSeek's EPLB makes it, made anew for
every window, with an expert's tokens split evenly over its replicas or by pure water-filling on the batch's own counts (replica
choice with alpha 0: what no split of tokens betters by more than rounding); and our plan, with replica choice by tokens and by
cost. What a plan knows is past windows, each weighing 0.8 of the one after it.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.placement import HostCapacity, PlannerSettings, plan, prepare
from model.logical_expert import LogicalExpert
from router import replica_choice
from router.grouping import NOBODY, NOT_WANTED
from router.placement_map import HostKey
from router.replica_choice import Costs, HostCost, Replicas, hosts_of_choices, share_tokens
from tests.benchmarks.results import machine, write_section
from tests.reference.eplb import eplb
from tests.shared_data import SHARED

NUM_HOSTS = 8
NUM_EXPERTS = 64
WINDOW = 512
BATCHES = (64, 512)
DECAY = 0.8
EXPERT_BYTES = 3 * 2048 * 1408 * 2  # DeepSeek-V2-Lite, bfloat16
ALPHA_MS, BETA_MS = 5.0, 0.2
BY_TOKENS = Costs.of([HostCost(0.0, BETA_MS)] * NUM_HOSTS)
BY_COST = Costs.of([HostCost(ALPHA_MS, BETA_MS)] * NUM_HOSTS)

# The experts of each host of each layer.
Placement = list[list[list[int]]]
Planner = Callable[[np.ndarray], Placement]
Choice = Callable[[np.ndarray, Replicas], np.ndarray]


@dataclass
class Score:
    """One side's figures, over windows, batches and layers."""

    balancedness: list[float] = field(default_factory=list)
    cost_ms: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in BATCHES})
    moved_bytes: list[int] = field(default_factory=list)

    def row(self) -> list[float]:
        """Balancedness, milliseconds for each size of batch, gigabytes a window."""
        moved = np.mean(self.moved_bytes) / 1e9 if self.moved_bytes else 0.0
        return [float(np.mean(values)) for values in (self.balancedness, *self.cost_ms.values())] + [float(moved)]


class OurPlanner:
    """Plans on from its last plan, as the Coordinator does."""

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self._hosts = {HostKey(f"host-{index}", 1): HostCapacity(f"node-{index}") for index in range(NUM_HOSTS)}
        self._experts = [LogicalExpert(layer, expert) for layer in range(num_layers) for expert in range(NUM_EXPERTS)]
        self._settings = PlannerSettings(redundancy=num_slots / NUM_EXPERTS - 1)
        self._present: dict[HostKey, frozenset[LogicalExpert]] = {}

    def __call__(self, loads: np.ndarray) -> Placement:
        by_expert = {expert: float(loads[expert]) for expert in self._experts}
        self._present = plan(self._experts, self._hosts, self._present, by_expert, EXPERT_BYTES, self._settings).desired
        placement: Placement = [[[] for _ in self._hosts] for _ in loads]
        for host, held in enumerate(self._present.values()):
            for expert in sorted(held):
                placement[expert.layer][host].append(expert.expert)
        return placement


def contiguous(loads: np.ndarray) -> Placement:
    """Without a plan: an eighth of the experts each."""
    return [np.arange(NUM_EXPERTS).reshape(NUM_HOSTS, -1).tolist()] * len(loads)


def eplb_planner(num_slots: int) -> Planner:
    return lambda loads: [eplb(layer + 1e-3, num_slots, NUM_HOSTS) for layer in loads]


def evenly(counts: np.ndarray, replicas: Replicas) -> np.ndarray:
    """An expert's tokens in turn over its replicas."""
    shares = np.zeros(len(replicas.holders), dtype=np.int64)
    for expert, count in enumerate(counts):
        first, last = replicas.starts[expert : expert + 2]
        places = np.arange(last - first)
        shares[first:last] = count // len(places) + (places < count % len(places))
    return shares


def chosen_by(costs: Costs) -> Choice:
    return lambda counts, replicas: share_tokens(counts, replicas, np.zeros(NUM_HOSTS), costs)


def sides(num_slots: int, num_layers: int) -> dict[str, tuple[Planner, Choice]]:
    return {
        f"contiguous, {NUM_EXPERTS} slots": (contiguous, evenly),
        "EPLB plan, even split": (eplb_planner(num_slots), evenly),
        "EPLB plan, water-filling": (eplb_planner(num_slots), chosen_by(BY_TOKENS)),
        "Shoal plan, replica choice by tokens": (OurPlanner(num_slots, num_layers), chosen_by(BY_TOKENS)),
        "Shoal plan, replica choice by cost": (OurPlanner(num_slots, num_layers), chosen_by(BY_COST)),
    }


def windows(names: Iterable[str], num_layers: int | None = None, num_windows: int | None = None) -> list[np.ndarray]:
    """The traces one after another, in windows [512, L, 6]."""
    found = []
    for name in names:
        trace = np.load(Path(SHARED) / "expert_traces" / f"{name}.npz")["expert_ids"][:, :num_layers]
        found += [trace[start : start + WINDOW] for start in range(0, len(trace) - WINDOW + 1, WINDOW)][:num_windows]
    return found


def replay(traffic: list[np.ndarray], planner: Planner, choice: Choice) -> Score:
    """Each window but the first, under the plan made from those before it."""
    score, loads, before = Score(), np.zeros((traffic[0].shape[1], NUM_EXPERTS)), None
    for number, window in enumerate(traffic):
        if number:
            placement = planner(loads)
            if before is not None:
                score.moved_bytes.append(EXPERT_BYTES * _num_loaded(before, placement))
            before = placement
            _judge(window, placement, choice, score)
        loads = DECAY * loads + np.stack([counts_of(window[:, layer]) for layer in range(window.shape[1])])
    return score


def counts_of(expert_ids: np.ndarray) -> np.ndarray:
    """Tokens for each expert [E]."""
    return np.bincount(expert_ids.ravel(), minlength=NUM_EXPERTS)


def _num_loaded(before: Placement, after: Placement) -> int:
    pairs = ((set(old), set(new)) for layers in zip(before, after, strict=True) for old, new in zip(*layers, strict=True))
    return sum(len(new - old) for old, new in pairs)


def _judge(window: np.ndarray, placement: Placement, choice: Choice, score: Score) -> None:
    for layer, held in enumerate(placement):
        replicas = Replicas.of([[host for host in range(NUM_HOSTS) if expert in held[host]] for expert in range(NUM_EXPERTS)])
        for size in BATCHES:
            for start in range(0, WINDOW, size):
                shares = choice(counts_of(window[start : start + size, layer]), replicas)
                costs = ALPHA_MS * (shares > 0) + BETA_MS * shares
                score.cost_ms[size].append(np.bincount(replicas.holders, weights=costs, minlength=NUM_HOSTS).max())
                if size == WINDOW:
                    tokens = np.bincount(replicas.holders, weights=shares, minlength=NUM_HOSTS)
                    score.balancedness.append(tokens.mean() / tokens.max())


def planning_ms(num_layers: int, num_experts: int, num_hosts: int, num_slots: int) -> tuple[float, float]:
    """A plan from nothing, and one after half of the load has gone to other experts; the median of five."""
    generator = np.random.default_rng(0)
    first = generator.lognormal(0, 1, (num_layers, num_experts))
    second = (first + np.roll(first, 7, axis=1)) / 2
    experts = [LogicalExpert(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    hosts = {HostKey(f"host-{index:02}", 1): HostCapacity(f"node-{index // 8}") for index in range(num_hosts)}
    settings = PlannerSettings(redundancy=num_slots / num_experts - 1)
    present: dict[HostKey, frozenset[LogicalExpert]] = {}
    medians = []
    for loads in (first, second):
        by_expert = {expert: float(loads[expert]) for expert in experts}
        times = []
        for _ in range(5):
            started = time.perf_counter()
            planned = plan(experts, hosts, present, by_expert, EXPERT_BYTES, settings)
            times.append(time.perf_counter() - started)
        present = planned.desired
        medians.append(float(np.median(times)) * 1e3)
    return medians[0], medians[1]


def choice_us(traffic: list[np.ndarray], num_tokens: int = 256) -> float:
    """Counting, choosing and spreading one batch of one layer; median over windows and layers, 80 slots."""
    times = []
    for window in traffic:
        for layer in range(window.shape[1]):
            held = eplb(counts_of(window[:, layer]) + 1e-3, 80, NUM_HOSTS)
            replicas = Replicas.of([[host for host in range(NUM_HOSTS) if expert in held[host]] for expert in range(NUM_EXPERTS)])
            ids, queued = window[:num_tokens, layer].astype(np.int16), np.zeros(NUM_HOSTS)
            started = time.perf_counter()
            shares = share_tokens(np.bincount(ids.ravel() + 1, minlength=NUM_EXPERTS + 1)[1:], replicas, queued, BY_COST)
            hosts_of_choices(ids, shares, replicas, NUM_HOSTS, NOBODY, NOT_WANTED)
            times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e6


def report() -> Iterator[str]:
    yield f"`python -m tests.benchmarks.placement_replay`, {NUM_HOSTS} hosts, 26 layers of {NUM_EXPERTS} experts, {machine()}."
    yield "Balancedness: tokens of the mean host over the busiest one's, windows of 512. Cost: the busiest host's, 5 ms for each activated"
    yield f"expert and 0.2 ms a token, per batch of 64 or 512. Moved: bytes to load per window, {EXPERT_BYTES / 1e6:.1f} MB an expert."
    for names in (("law",), ("translation",), ("law", "translation")):
        traffic = windows(names)
        for num_slots in (72, 80):
            yield f"\n{' then '.join(names)}, {num_slots} slots a layer:\n"
            yield "| plan, choice | balancedness | ms at 64 | ms at 512 | moved GB |\n| --- | ---: | ---: | ---: | ---: |"
            rows = {}
            for name, (planner, choice) in sides(num_slots, traffic[0].shape[1]).items():
                rows[name] = replay(traffic, planner, choice).row()
                balancedness, *costs, moved = rows[name]
                yield f"| {name} | {balancedness:.3f} | {costs[0]:.1f} | {costs[1]:.1f} | {moved:.2f} |"
            ours = rows["Shoal plan, replica choice by cost"]
            ratios = [
                f"{ours[place] / rows[side][place]:.3f} of {side} at {size}"
                for side in ("EPLB plan, even split", "EPLB plan, water-filling")
                for place, size in enumerate(BATCHES, 1)
            ]
            yield f"\nCost of ours: {', '.join(ratios)}."
    yield "\n| layers x experts, hosts, slots a layer | plan from nothing, ms | after half the load has moved, ms |\n| --- | ---: | ---: |"
    for shape in ((26, 64, 8, 80), (58, 256, 32, 288), (58, 256, 64, 320)):
        fresh, moved = planning_ms(*shape)
        yield f"| {shape[0]} x {shape[1]}, {shape[2]}, {shape[3]} | {fresh:.0f} | {moved:.0f} |"
    yield f"\nReplica choice for a batch of 256 tokens: {choice_us(windows(('law',))[:4]):.0f} us a layer."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the tables in RESULTS.md")
    arguments = parser.parse_args()
    prepare()
    replica_choice.prepare()
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        write_section("Placement", "\n".join(lines))


if __name__ == "__main__":
    main()
