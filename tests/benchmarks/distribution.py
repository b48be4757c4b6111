"""What distribution costs: one engine with its experts here, and the same engine with them in host processes, in turns.

    python -m tests.benchmarks.distribution [--concurrency 1,8,32] [--rounds 5] [--hosts 2] [--shape deepseek_v2] [--write]

Without Ray and HTTP: what is compared is the way of the tokens. Both sides have the node's cores, prompts of 64 and answers of 64 tokens,
a closed loop. The ratio is that of neighbours, the median of all rounds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.architectures import read_config
from model.experts import Experts
from model.loading import logical_experts
from router.dispatch import DistributedExperts
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.transport.connect import connect
from tests.benchmarks.benchmark_model import benchmark_checkpoint
from tests.benchmarks.distribution_host import host_of
from tests.benchmarks.growth.hosts import MeteredHost
from tests.benchmarks.results import machine, write_section
from tests.benchmarks.throughput import Load, LocalEngine, read_bandwidth
from tests.router.expert_process import APPLICATION, NODE, SECRET


@contextlib.contextmanager
def host_process(directory: Path, index: int, num_hosts: int, num_threads: int) -> Iterator[Endpoint]:
    """One host; yields where it listens."""
    host = MeteredHost("tests.benchmarks.distribution_host", directory, index, num_hosts, num_threads)
    with contextlib.closing(host):
        yield Endpoint(**json.loads(host.read()))


@contextlib.contextmanager
def experts_on_hosts(directory: Path, num_hosts: int) -> Iterator[DistributedExperts]:
    """A router's way to so many hosts, which hold every expert once; the cores are shared as they are when served."""
    config, cores = read_config(directory), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        endpoints = [
            stack.enter_context(host_process(directory, index, num_hosts, max(1, cores // num_hosts))) for index in range(num_hosts)
        ]
        hosts = {HostKey(f"host-{index}", 1): endpoint for index, endpoint in enumerate(endpoints)}
        keys, number = list(hosts), config.num_routed_experts
        held = {expert: (keys[host_of(expert.expert, number, num_hosts)],) for expert in logical_experts(config)}
        experts = stack.enter_context(
            contextlib.closing(DistributedExperts(lambda _, endpoint: connect(endpoint, NODE, SECRET, APPLICATION)))
        )
        if not experts.adopt(PlacementMap(MapVersion(1, 1), hosts, held)):
            raise RuntimeError("the router refused the placement")
        yield experts


@dataclass(frozen=True)
class Timed:
    """Tokens a second of each round, with experts here and on hosts, and whether all answers agree."""

    here: list[float]
    on_hosts: list[float]
    agree: bool

    @property
    def ratio(self) -> float:
        """On hosts / here, the median of the rounds."""
        return statistics.median(far / near for near, far in zip(self.here, self.on_hosts, strict=True))


def measure(engine: LocalEngine, experts: Experts, load: Load, concurrency: int) -> Timed:
    """One round of each in turns, after one that does not count."""
    speeds: tuple[list[float], list[float]] = ([], [])
    agree = True
    for round_number in range(load.rounds + 1):
        prompts, answers = load.prompts(concurrency, round_number), []
        for side, rates in zip((engine.experts, experts), speeds, strict=True):
            started = time.perf_counter()
            answers.append(engine(prompts, concurrency, side))
            if round_number:
                rates.append(len(prompts) * load.output_tokens / (time.perf_counter() - started))
        agree &= answers[0] == answers[1]
    return Timed(*speeds, agree)


def table(timed: dict[int, Timed]) -> str:
    """Markdown: a row for each number of sequences."""
    lines = ["| sequences | experts here | on hosts | on hosts / here | answers |", "| ---: | ---: | ---: | ---: | --- |"]
    for concurrency, each in timed.items():
        here, far = statistics.median(each.here), statistics.median(each.on_hosts)
        lines.append(f"| {concurrency} | {here:.1f} | {far:.1f} | {each.ratio:.2f} | {'the same' if each.agree else 'DIFFER'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint directory [default: the seeded benchmark model in bfloat16]")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    arguments = parser.parse_args()
    directory = arguments.model or benchmark_checkpoint(dtype=torch.bfloat16)
    load = Load(64, 64, 1, arguments.rounds, read_config(directory).vocab_size)
    bandwidth = read_bandwidth()
    engine = LocalEngine(directory, load)
    timed = {}
    with experts_on_hosts(directory, arguments.hosts) as experts:
        for concurrency in map(int, arguments.concurrency.split(",")):
            timed[concurrency] = measure(engine, experts, load, concurrency)
            print(table({concurrency: timed[concurrency]}).splitlines()[-1], file=sys.stderr)
    text = (
        "`python -m tests.benchmarks.distribution`: output tokens a second of one engine, its experts in this process or in "
        f"{arguments.hosts} host processes, without Ray and HTTP; prompts and answers of {load.prompt_tokens} tokens, closed loop, "
        f"medians of {load.rounds} rounds in turns; {directory.name}. {machine()}; memory read at {bandwidth / 1e9:.1f} GB/s.\n\n"
        f"{table(timed)}"
    )
    print(text)
    if arguments.write:
        write_section("Distribution", text)


if __name__ == "__main__":
    main()
