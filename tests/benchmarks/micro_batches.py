"""One micro-batch in flight or two, with and without a millisecond of delay on the way to the hosts; and which one the engine chooses.

    python -m tests.benchmarks.micro_batches [--write]

The dense part of the benchmark model (5 layers) over two metered hosts in processes of their own, which answer zeros at once: what is
waited for is the way. One, two and the engine's own choice follow one another in each round; the best round of each counts.
"""

import argparse
from typing import NamedTuple

import torch

from router.micro_batches import MicroBatches
from tests.benchmarks.growth.decoding import Decoding
from tests.benchmarks.growth.hosts import CONTEXT, LAYERS, VOCABULARY, MeteredHost, experts_on, metered_hosts
from tests.benchmarks.growth.model import Built, build_model, model_config
from tests.benchmarks.results import machine, write_section
from tests.fixed_micro_batches import Always

NUM_HOSTS = 2
DELAYS_S = (0.0, 0.001)
BATCHES = (8, 16, 32, 64)
ROUNDS, BUDGET_S = 5, 3.0


class Timed(NamedTuple):
    """Seconds of a step with one, with two and with as many as the engine chose, which were two in so large a share of its steps."""

    one_s: float
    two_s: float
    chosen_s: float
    split_share: float


def measure(built: Built, processes: list[MeteredHost], batch: int, delay_s: float, experts: object) -> Timed:
    """The best of the rounds."""
    for process in processes:
        process.delay(0.0, delay_s)
    steps: dict[str, list[float]] = {"one": [], "two": [], "chosen": []}
    share = 0.0
    for _ in range(ROUNDS):
        for name, micro_batches in (("one", Always(1)), ("two", Always(2)), ("chosen", MicroBatches())):
            decoding = Decoding(built.model, experts, batch, CONTEXT, micro_batches)
            steps[name].append(decoding.time(BUDGET_S).step_s)
            share = decoding.split_share
    return Timed(*(min(steps[name]) for name in ("one", "two", "chosen")), share)


def table(rows: dict[tuple[float, int], Timed]) -> str:
    """Milliseconds of a step."""
    lines = [
        f"`python -m tests.benchmarks.micro_batches`: a decode step of the benchmark model's dense part ({LAYERS} layers, {LAYERS - 1} of "
        f"them with routed experts) over {NUM_HOSTS} hosts that answer zeros at once; `way` is a delay before a frame reaches its host. "
        f"Median step of the best of {ROUNDS} rounds. {machine()}.",
        "",
        "| way, ms | sequences | one, ms | two, ms | one / two | the engine's choice, ms | its steps in two |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (delay_s, batch), timed in rows.items():
        lines.append(
            f"| {1e3 * delay_s:.0f} | {batch} | {1e3 * timed.one_s:.2f} | {1e3 * timed.two_s:.2f} | {timed.one_s / timed.two_s:.2f} | "
            f"{1e3 * timed.chosen_s:.2f} | {timed.split_share:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    built = build_model(model_config(LAYERS, vocabulary=VOCABULARY), num_threads=1, has_experts=False)
    rows = {}
    with metered_hosts(NUM_HOSTS) as (processes, endpoints), experts_on(built, endpoints) as experts:
        for delay_s in DELAYS_S:
            for batch in BATCHES:
                rows[delay_s, batch] = measure(built, processes, batch, delay_s, experts)
                print(f"{1e3 * delay_s:.0f} ms, {batch} sequences: {rows[delay_s, batch]}", flush=True)
    text = table(rows)
    print(text)
    if arguments.write:
        write_section("Micro-batches", text)


if __name__ == "__main__":
    main()
