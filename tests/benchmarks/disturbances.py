"""How long streams pause when something dies: hosts, routers and the Coordinator, under 16 greedy streams of real weights.

    python -m tests.benchmarks.disturbances [--operations 200] [--write]

SmolLM2 upcycled to 8 experts a layer, three hosts, two routers, two replicas of each expert (one in the last row). Every answer must be the
undisturbed run's, but for ties of the two best logits. Then random operations (hosts added, removed, killed, rebalanced) under load.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable

from tests.benchmarks.results import machine, write_section
from tests.benchmarks.stall_watch import StallWatch
from tests.cluster.conftest import App, Shoals, two_nodes_of_ray
from tests.cluster.load import Load, ask_all
from tests.cluster.random_operations import SETTINGS, is_consistent, run_operations
from tests.cluster.replicas import pids_of
from tests.cluster.streams import Disturbance, Stream, Streams, disturbed
from tests.cluster.test_failures import FROZEN_S, NUM_HOSTS, NUM_STREAMS, NUM_TOKENS, prompts, wait_until_whole
from tests.demo_checkpoint import demo_paths

LOAD_TOKENS = 16


def kill(app: App, role: str) -> Callable[[], None]:
    return lambda: os.kill(pids_of(app, role)[0], signal.SIGKILL)


def freeze(app: App) -> Callable[[], None]:
    def stop_and_go() -> None:
        victim = pids_of(app, "ExpertHost")[0]
        os.kill(victim, signal.SIGSTOP)
        threading.Timer(FROZEN_S, os.kill, (victim, signal.SIGCONT)).start()

    return stop_and_go


def run_disturbances(shoals: Shoals) -> list[tuple[Disturbance, float]]:
    """Each with the longest stall of the machine itself meanwhile, in seconds."""
    results = []

    def disturb_under(app: App, name: str, undisturbed: list[Stream], disturb: Callable[[], None]) -> None:
        with StallWatch() as watch:
            result = disturbed(name, app, prompts(), undisturbed, disturb)
        results.append((result, watch.longest_s))
        print(result, f"(the machine stood still for {watch.longest_s:.2f} s)", flush=True)

    settings = {"expert_host__replicas": NUM_HOSTS, "router__replicas": 2, "placement__min_replicas": 2}
    with shoals.running(demo_paths().mixtral, "elastic", **settings) as app:
        wait_until_whole(app, 2)
        undisturbed = Streams(app, prompts(), NUM_TOKENS).finish()
        for name, disturb in (
            ("host killed", kill(app, "ExpertHost")),
            ("host frozen for 10 s", freeze(app)),
            ("router killed", kill(app, "Router")),
            ("Coordinator killed", kill(app, "Coordinator")),
        ):
            disturb_under(app, name, undisturbed, disturb)
            time.sleep(FROZEN_S + 5)
            wait_until_whole(app, 2)
    with shoals.running(demo_paths().mixtral, "alone", expert_host__replicas=NUM_HOSTS) as app:
        wait_until_whole(app, 1)
        undisturbed = Streams(app, prompts(), NUM_TOKENS).finish()
        disturb_under(app, "host killed, one replica of each expert", undisturbed, kill(app, "ExpertHost"))
    return results


def run_random_operations(shoals: Shoals, number: int) -> str:
    with shoals.running(demo_paths().mixtral, "unlucky", **SETTINGS) as app:
        answers = ask_all(app, [tuple(prompt) for prompt in prompts()], LOAD_TOKENS)
        started = time.monotonic()
        with Load(app, answers, num_clients=4, num_tokens=LOAD_TOKENS) as load:
            done = run_operations(app, number, seed=7)
            elapsed_s = time.monotonic() - started
            while not is_consistent(app, 3):
                assert time.monotonic() - started < elapsed_s + 120, app.view()["events"]
                time.sleep(0.5)
        kinds = ", ".join(f"{count} x {what}" for what, count in sorted(done.items()))
        wrong = f"{len(load.problems)} failed or wrong" + (f": {load.problems[:5]}" if load.problems else "")
        return (
            f"{number} random operations in {elapsed_s:.0f} s under 4 clients ({kinds}): {load.num_answers} answers, {wrong}; "
            f"consistent {time.monotonic() - started - elapsed_s:.1f} s after the last."
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    arguments = parser.parse_args()
    with two_nodes_of_ray() as shoals:
        results = run_disturbances(shoals)
        operations = run_random_operations(shoals, arguments.operations) if arguments.operations else ""
    rows = [
        f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens, SmolLM2 upcycled, {NUM_HOSTS} hosts. {machine()}.",
        "",
        "| what | longest gap between two tokens, s | undisturbed, s | beyond the usual, s | longest stall of the machine itself, s "
        "| answers that part at a tie |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for it, stall_s in results:
        beyond_s = it.longest_gap_s - it.usual_gap_s
        rows.append(f"| {it.name} | {it.longest_gap_s:.2f} | {it.usual_gap_s:.2f} | {beyond_s:.2f} | {stall_s:.2f} | {len(it.ties)} |")
    text = "\n".join([*rows, "", operations])
    print(text)
    if arguments.write:
        write_section("Disturbances", text)


if __name__ == "__main__":
    main()
