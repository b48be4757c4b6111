"""Shoal beside llama.cpp, vLLM and transformers, each alone in its turn.

    python -m tests.benchmarks.peers [--model-shape deepseek_v2|mixtral|both] [--sides ...] [--clients 1,8,32] [--rounds N] [--write]

Installs the peers into environments of their own below build/peers, writes the seeded checkpoints in bfloat16, holds every side's greedy
tokens to those of transformers in float32, and measures each over HTTP: /v1/completions, streamed, greedy, closed loop, prompts of 64
tokens and answers of 64; prefill: prompts of 512, one token out, 4 clients. Fails if a side does not run or if Shoal's tokens differ.
"""

import argparse
import os
import signal
import sys

from tests.benchmarks.peers import floors
from tests.benchmarks.peers.checkpoints import SHAPES, Shape
from tests.benchmarks.peers.environments import LLAMA_PINS, VLLM_PIN, PeerFailed
from tests.benchmarks.peers.oracle import oracle_answers
from tests.benchmarks.peers.side_run import Plan, Result, run_side
from tests.benchmarks.peers.sides import SIDES, Side, chosen
from tests.benchmarks.peers.table import SHOAL, ratios_table, results_table
from tests.benchmarks.results import machine, write_section


def report(shape: Shape, results: list[Result], measured: floors.Machine, costs: floors.Costs, plan: Plan, busy: float) -> str:
    """The section of RESULTS.md."""
    speeds = f"{measured.float32_per_s / 1e9:.0f} GFLOP/s in float32 and {measured.bfloat16_per_s / 1e9:.0f} in bfloat16"
    parts = [
        f"`python -m tests.benchmarks.peers --model-shape {shape.name}`: a seeded checkpoint in bfloat16, {costs.parameters / 1e6:.0f}M "
        f"parameters. /v1/completions, streamed, closed loop of {plan.requests} requests a client, 64 tokens in and 64 out; "
        f"prefill: 512 in, 1 out, 4 clients. Best of {plan.rounds} rounds; gaps are between a stream's events, in the round that is "
        f"kept. Two threads each. {machine()}; reads {measured.read_per_s / 1e9:.1f} GB/s, multiplies {speeds}; "
        f"load average before the run {busy:.1f}. Peers from PyPI: {LLAMA_PINS[0]} (llama.cpp built for AVX2; its loader wants a query "
        f"LoRA of deepseek_v2 and gets the identity, 4 % more to read for one client), {VLLM_PIN}.",
        results_table(results, plan.clients),
        floors.table(measured, costs, plan.clients),
        ratios_table(results, plan.clients),
    ]
    return "\n\n".join(part for part in parts if part)


def run_shape(shape: Shape, sides: list[Side], plan: Plan) -> tuple[str, list[str]]:
    """The report, and a sentence for each failure; sides after one that fails still run."""
    busy = os.getloadavg()[0]
    measured = floors.measured_machine()
    print(f"{shape.name}: this machine reads {measured.read_per_s / 1e9:.1f} GB/s, multiplies {measured.float32_per_s / 1e9:.0f} GFLOP/s")
    checkpoint = shape.checkpoint()
    oracle = oracle_answers(checkpoint)
    costs = floors.costs_of(checkpoint, plan.clients)
    results, failures = [], []
    for side in sides:
        try:
            results.append(run_side(side, checkpoint, oracle, plan))
        except (PeerFailed, RuntimeError) as error:
            failures.append(f"{shape.name}, {side.name}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
    failures += [
        f"{shape.name}: Shoal's greedy tokens are not those of transformers in float32 ({result.agreement})"
        for result in results
        if result.side.engine == SHOAL and not result.agreement.counts
    ]
    return report(shape, results, measured, costs, plan, busy) if results else "", failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=(*SHAPES, "both"), default="both")
    parser.add_argument("--sides", default=",".join(side.name for side in SIDES), help="engines, or engine-precision")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the tables in RESULTS.md; not done if anything failed")
    arguments = parser.parse_args()
    try:
        sides = chosen(arguments.sides)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that a side's server ends too
    plan = Plan(tuple(int(number) for number in arguments.clients.split(",")), arguments.requests, arguments.rounds)
    failures: list[str] = []
    for shape in SHAPES.values() if arguments.model_shape == "both" else [SHAPES[arguments.model_shape]]:
        text, failed = run_shape(shape, sides, plan)
        print(f"\n{text}\n", flush=True)
        if arguments.write and not failed:
            write_section(f"Peers, {shape.name}", text)
        failures += failed
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
