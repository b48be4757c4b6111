"""A host of the distribution benchmark, in a process of its own: a share of a checkpoint's experts behind the product's own server.

    python -m tests.benchmarks.distribution_host CHECKPOINT INDEX NUM_HOSTS NUM_THREADS

Prints its endpoint as JSON; ends with its input.
"""

import sys
from pathlib import Path

import torch

from model.architectures import load_expert, read_config
from model.experts import ExpertSlots
from model.loading import logical_experts
from model.weights import Checkpoint
from tests.router.expert_process import serve


def host_of(expert: int, num_experts: int, num_hosts: int) -> int:
    """Experts lie on hosts in equal runs."""
    return expert * num_hosts // num_experts


def main(directory: Path, index: int, num_hosts: int, num_threads: int) -> None:
    """Serves until standard input ends."""
    torch.set_num_threads(1)
    config, stored = read_config(directory), Checkpoint(directory, torch.device("cpu"))
    mine = [expert for expert in logical_experts(config) if host_of(expert.expert, config.num_routed_experts, num_hosts) == index]
    serve(ExpertSlots(((expert, load_expert(config, stored, expert)) for expert in mine), num_threads))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
