"""One router over 1 to 8 metered host processes, in shared memory and without Ray: a step's time against the hosts."""

import contextlib
import json
import math
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model import cpu_threads
from model.loading import logical_experts
from model.logical_expert import LogicalExpert
from router.dispatch import DispatchLimits, DistributedExperts
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.transport.connect import connect
from tests.benchmarks.growth.decoding import Decoding
from tests.benchmarks.growth.host_process import APPLICATION, NODE, SECRET
from tests.benchmarks.growth.model import Built, build_model, model_config

ROOT = Path(__file__).parents[3]
HOSTS = (1, 2, 4, 8)
BATCHES = (32, 256)
LAYERS = 5
DELAY_S = 100e-6  # of one token in one expert
VOCABULARY = 2048  # a head that does not outweigh what hosts are for
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 10.0
CONTEXT = 64


@dataclass(frozen=True)
class HostsPoint:
    """Seconds of a step; `idle_s` is without the hosts' delay, and then `router_cpu_s` of a core are used by the router in a step and
    `host_cpu_s` by a host for a frame. `busiest`: choices a layer of the host that has most, on average; `even`: of all alike."""

    batch: int
    hosts: int
    step_s: float
    idle_s: float
    router_cpu_s: float
    host_cpu_s: float
    busiest: float
    even: float


class MeteredHost:
    """A host's process, as its router sees it."""

    def __init__(self, module: str = "tests.benchmarks.growth.host_process", *arguments: object) -> None:
        """Of another module: one that prints its endpoint and ends with its input too."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, bufsize=0)

    def read(self) -> str:
        """Its next line; RuntimeError if none comes in time."""
        assert self._process.stdout is not None
        deadline, said = time.monotonic() + START_TIMEOUT_S, b""
        while not said.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                raise RuntimeError(f"a metered host said {said!r} and no more within {START_TIMEOUT_S:.0f} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise RuntimeError(f"a metered host ended; it said {said!r}")
            said += chunk
        return said.decode()

    def delay(self, choice_s: float, way_s: float = 0.0) -> float:
        """Of each choice, and of each frame's way there. Returns when it holds, with the processor seconds that the host has used."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{choice_s} {way_s}\n".encode())
        return float(self.read())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def metered_hosts(number: int) -> Iterator[tuple[list[MeteredHost], list[Endpoint]]]:
    """That many, started side by side, and where they listen."""
    with contextlib.ExitStack() as stack:
        hosts = [MeteredHost() for _ in range(number)]
        for host in hosts:
            stack.callback(host.close)
        yield hosts, [Endpoint(**json.loads(host.read())) for host in hosts]


def placement(built: Built, endpoints: list[Endpoint]) -> PlacementMap:
    """Every expert once, in equal runs."""
    hosts = {HostKey(f"host-{number}", 1): endpoint for number, endpoint in enumerate(endpoints)}
    keys, num_experts = tuple(hosts), built.config.num_routed_experts
    holders: dict[LogicalExpert, tuple[HostKey, ...]] = {
        expert: (keys[expert.expert * len(keys) // num_experts],) for expert in logical_experts(built.config)
    }
    return PlacementMap(MapVersion(1, 1), hosts, holders)


def quieter_hosts(first: HostsPoint, second: HostsPoint) -> HostsPoint:
    """Of two passes, with and without the delay: whatever else the machine does only slows a step."""
    better = first if first.step_s <= second.step_s else second
    idle = first if first.idle_s <= second.idle_s else second
    return replace(better, idle_s=idle.idle_s, router_cpu_s=idle.router_cpu_s, host_cpu_s=idle.host_cpu_s)


def busiest_choices(choices: list[Tensor], num_hosts: int, num_experts: int) -> float:
    """Of expert_ids [T, K] of each layer: the choices of the host that has most, on average over the layers."""
    loads = [torch.bincount((ids.flatten() * num_hosts).div(num_experts, rounding_mode="floor"), minlength=num_hosts) for ids in choices]
    return statistics.mean(int(load.max()) for load in loads)


def sweep_hosts(budget_s: float) -> Iterator[HostsPoint]:
    """Every batch on every number of hosts, the same processes throughout. torch has one thread: hosts share the cores."""
    built = build_model(model_config(LAYERS, vocabulary=VOCABULARY), num_threads=1, has_experts=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu_threads.allow(1)
    try:
        with metered_hosts(max(HOSTS)) as (processes, endpoints):
            for batch in BATCHES:
                for number in HOSTS:
                    yield _measure(built, processes, endpoints[:number], batch, budget_s)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def experts_on(built: Built, endpoints: list[Endpoint]) -> Iterator[DistributedExperts]:
    """A router's way to them."""
    experts = DistributedExperts(
        lambda _, endpoint: connect(endpoint, NODE, SECRET, APPLICATION), limits=DispatchLimits(step_timeout_s=60.0)
    )
    with contextlib.closing(experts):
        if not experts.adopt(placement(built, endpoints)):
            raise RuntimeError("the router refused the placement")
        yield experts


def _measure(built: Built, processes: list[MeteredHost], endpoints: list[Endpoint], batch: int, budget_s: float) -> HostsPoint:
    num_experts, num_layers = built.config.num_routed_experts, built.sizes.num_moe_layers
    with experts_on(built, endpoints) as experts:
        used_s = math.fsum(process.delay(0.0) for process in processes)
        idle = Decoding(built.model, experts, batch, CONTEXT).time(budget_s)
        used_s = math.fsum(process.delay(DELAY_S) for process in processes) - used_s
        decoding = Decoding(built.model, experts, batch, CONTEXT)
        busy = decoding.time(budget_s)
        for process in processes:
            process.delay(0.0)
        busiest = busiest_choices(decoding.choices(), len(endpoints), num_experts)
    frame_s = used_s / (idle.num_steps * num_layers * len(endpoints))
    even = batch * built.sizes.top_k / len(endpoints)
    return HostsPoint(batch, len(endpoints), busy.step_s, idle.step_s, idle.cpu_s, frame_s, busiest, even)


def sleep_overshoot_s() -> float:
    """What `time.sleep` takes beyond what it is asked for, median: a host pays it once a layer."""
    over = []
    for _ in range(200):
        began = time.perf_counter()
        time.sleep(0.001)
        over.append(time.perf_counter() - began - 0.001)
    return statistics.median(over)
