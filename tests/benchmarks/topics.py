"""What it costs that replicas move: streams while their routing turns from one topic to another, with moves and without.

    python -m tests.benchmarks.topics [--pairs 5] [--write]

The expert traces, law and then translation, as the routing of a tiny checkpoint of their shape on metered hosts (see
tests.cluster.topic_replay). Each pair begins with one and the same placement, planned for the whole of law. Without moves comes first,
which leaves that placement as it is, so that both sides begin with it: how well a placement fits differs by more than moves cost.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.results import machine, write_section
from tests.benchmarks.stall_watch import StallWatch
from tests.cluster.conftest import App, two_nodes_of_ray
from tests.cluster.topic_replay import (
    DELAY_S,
    FIRST,
    MOVING,
    NUM_EXPERTS,
    NUM_HOSTS,
    NUM_LAYERS,
    NUM_STREAMS,
    SECOND,
    SETTINGS,
    SLOTS_PER_LAYER,
    STILL,
    Loops,
    Replay,
    look_every,
    place,
    remember,
    replay,
    topic_actors,
    turn_to,
    wait_until_converged,
    write_topic_checkpoint,
)

INTERVAL = "placement__rebalance_interval_s"
SETTLE_S, FIRST_S, SECOND_S = 3.0, 5.0, 25.0


@dataclass(frozen=True)
class Side:
    """A replay, and for how long the machine itself stood still at most meanwhile."""

    replay: Replay
    stall_s: float


def run_pairs(num_pairs: int) -> list[tuple[Side, Side]]:
    """(with moves, without) of each pair."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder, two_nodes_of_ray() as shoals, topic_actors():
        checkpoint = write_topic_checkpoint(Path(folder))
        with shoals.running(checkpoint, "topics", **SETTINGS, **STILL) as app, Loops(app) as loops:
            for _ in range(num_pairs):
                turn_to(checkpoint, FIRST)
                place(app, FIRST)
                still = _side(app, loops, checkpoint, STILL[INTERVAL])
                turn_to(checkpoint, FIRST)
                moving = _side(app, loops, checkpoint, MOVING[INTERVAL])
                wait_until_converged(app)
                pairs.append((moving, still))
                print(*pairs[-1], f"load average {os.getloadavg()[0]:.1f}", sep="\n", flush=True)
    return pairs


def _side(app: App, loops: Loops, checkpoint: Path, interval_s: float) -> Side:
    time.sleep(SETTLE_S)
    remember(app, FIRST)  # and nothing of the side before
    look_every(app, interval_s)
    with StallWatch() as watch:
        result = replay(app, loops, checkpoint, FIRST_S, SECOND_S)
    look_every(app, STILL[INTERVAL])
    return Side(result, watch.longest_s)


def table(pairs: list[tuple[Side, Side]]) -> str:
    """One row for each pair, and what they come to."""
    look_s = MOVING[INTERVAL]
    rows = [
        f"`python -m tests.benchmarks.topics`: {NUM_STREAMS} closed-loop streams; {NUM_LAYERS} MoE layers of {NUM_EXPERTS} experts, routed "
        f"as the trace `{FIRST}` for {FIRST_S:.0f} s, then as `{SECOND}` for {SECOND_S:.0f} s; {NUM_HOSTS} hosts with {SLOTS_PER_LAYER} "
        f"replicas a layer, metered at {1e3 * DELAY_S:.2f} ms for a token's expert, slept. Both sides of a pair "
        f"begin with one placement, planned for all of `{FIRST}`; with moves, the balance is looked at every {look_s:.0f} s. {machine()}.",
        "",
        "| pair | tokens/s with moves | without | ratio | longest gap with, s | without, s | machine stalled with, s | without, s "
        f"| replicas loaded | MB | maps | replicas gained by the hottest of `{SECOND}` | errors |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    ratios = []
    for number, sides in enumerate(pairs, start=1):
        moving, still = (side.replay for side in sides)
        stalls = " | ".join(f"{side.stall_s:.2f}" for side in sides)
        ratios.append(moving.tokens_per_s / still.tokens_per_s)
        rows.append(
            f"| {number} | {moving.tokens_per_s:.1f} | {still.tokens_per_s:.1f} | {ratios[-1]:.3f} | {moving.longest_gap_s:.2f} | "
            f"{still.longest_gap_s:.2f} | {stalls} | {moving.num_moves} | {moving.moved_bytes / 1e6:.2f} | {moving.num_maps} | "
            f"{moving.more_replicas} | {len(moving.problems) + len(still.problems)} |"
        )
    gaps = [max(side.replay.longest_gap_s for side in column) for column in zip(*pairs, strict=True)]
    loads = sum(still.replay.num_moves for _, still in pairs)
    rows += [
        "",
        f"Median ratio {statistics.median(ratios):.3f} (asked for: at least 0.98); longest gap {gaps[0]:.2f} s with moves (asked for: "
        f"at most 0.5 s), {gaps[1]:.2f} s without; the side without loaded {loads} replicas in the measured time.",
    ]
    problems = [problem for pair in pairs for side in pair for problem in side.replay.problems]
    return "\n".join([*rows, *(f"- {problem}" for problem in problems)])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    arguments = parser.parse_args()
    text = table(run_pairs(arguments.pairs))
    print(text)
    if arguments.write:
        write_section("Topics", text)


if __name__ == "__main__":
    main()
