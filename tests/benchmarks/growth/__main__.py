"""Cost of a decode step against batch, context, layers, experts a layer and hosts, each beside the law it should follow.

    python -m tests.benchmarks.growth [--only batch,context,layers,experts,hosts] [--write]

Seeded deepseek_v2 models of the benchmark's widths, in memory as a bfloat16 checkpoint gives them; one process, two threads, experts
beside the engine. Hosts: one router over metered host processes. `--write` keeps tables and picture, and wants all five sweeps.
"""

import argparse
import os
import sys
from functools import reduce
from pathlib import Path

import torch

from tests.benchmarks.growth.hosts import BATCHES, HostsPoint, quieter_hosts, sleep_overshoot_s, sweep_hosts
from tests.benchmarks.growth.laws import Machine
from tests.benchmarks.growth.picture import Panel, draw
from tests.benchmarks.growth.report import hosts_panel, hosts_text, law_in_words, sweep_panel, sweep_text
from tests.benchmarks.growth.sweeps import SWEEPS, THREADS, Measured, Sweep, judge, matrix_rate, quieter, run_sweep
from tests.benchmarks.results import machine, write_section
from tests.benchmarks.throughput import read_bandwidth

PICTURE = Path(__file__).parents[1] / "growth.svg"
PASSES = 2  # apart in time: what disturbs one pass seldom disturbs the other
NAMES = (*(sweep.name for sweep in SWEEPS), "hosts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--budget", type=float, default=2.5, help="seconds of steps for each point, in two passes")
    parser.add_argument("--picture", type=Path, help="draw what was run into this file")
    parser.add_argument("--write", action="store_true", help="keep tables and picture beside RESULTS.md")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    if not wanted <= set(NAMES):
        parser.error(f"--only takes {', '.join(NAMES)}")
    if arguments.write and wanted != set(NAMES):
        parser.error("--write keeps all five sweeps of one run: leave --only out")

    torch.set_num_threads(THREADS)
    busy = os.getloadavg()[0]
    bandwidth, rate = read_bandwidth(), matrix_rate()
    measured = {sweep.name: _measure(sweep, arguments.budget) for sweep in SWEEPS if sweep.name in wanted}
    host_points = _measure_hosts(arguments.budget) if "hosts" in wanted else []
    torch.set_num_threads(THREADS)
    rates = Machine(max(bandwidth, read_bandwidth()), max(rate, matrix_rate()))

    texts: list[str] = []
    panels: list[Panel] = []
    for sweep in (sweep for sweep in SWEEPS if sweep.name in wanted):
        points = [judge(rates, point) for point in measured[sweep.name]]
        texts.append(sweep_text(sweep, points))
        panels.append(sweep_panel(sweep, points))
    if host_points:
        texts.append(hosts_text(host_points, sleep_overshoot_s()))
        panels += [hosts_panel(host_points, batch) for batch in BATCHES]
    first = (
        "`python -m tests.benchmarks.growth --write`: ms of a decode step, medians, the quieter of two passes; seeded deepseek_v2 "
        f"models of the benchmark's widths as a bfloat16 checkpoint gives them. {machine()}; load average before the run {busy:.1f}."
    )
    text = "\n\n".join([first, "![steps against their laws](growth.svg)", law_in_words(rates), *texts])
    print(text)
    if arguments.write or arguments.picture:
        draw(panels, PICTURE if arguments.write else arguments.picture)
    if arguments.write:
        write_section("Growth", text)


def _measure(sweep: Sweep, budget_s: float) -> list[Measured]:
    passes: list[list[Measured]] = []
    for number in range(PASSES):
        passes.append([])
        for point in run_sweep(sweep, budget_s / PASSES):
            print(f"{sweep.name} {point.value}, pass {number + 1}: {1e3 * point.step_s:.1f} ms", file=sys.stderr)
            passes[-1].append(point)
    return [reduce(quieter, points) for points in zip(*passes, strict=True)]


def _measure_hosts(budget_s: float) -> list[HostsPoint]:
    passes: list[list[HostsPoint]] = []
    for number in range(PASSES):
        passes.append([])
        for point in sweep_hosts(budget_s / PASSES):
            print(f"batch {point.batch} on {point.hosts} hosts, pass {number + 1}: {1e3 * point.step_s:.1f} ms", file=sys.stderr)
            passes[-1].append(point)
    return [reduce(quieter_hosts, points) for points in zip(*passes, strict=True)]


if __name__ == "__main__":
    main()
