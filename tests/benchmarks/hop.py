"""What a hop costs: one router sends a token batch to two host processes and waits for both partial sums.

    python -m tests.benchmarks.hop [--write] [--without-ray]

The floor is a bare copy and wake between the same processes: rows copied into memory that both map, one eventfd written to wake
the host's thread, which copies them back and writes another. Beside it, in turns within one run so that whatever else the
machine does meets all: the channel in shared memory, answered by the thread that reads (as decodes are) or handed to a compute
thread (as prefills are); the same through DistributedExperts, which groups the tokens by host and adds up what comes back, and
whose frames of more than 128 tokens count as prefills; TCP; and Ray actor calls with the same bytes. Prints medians in
microseconds; --write puts the table into RESULTS.md.
"""

import argparse
import contextlib
import itertools
import os
import select
import time

import numpy as np
import torch

from model.gate import Routing
from model.logical_expert import LogicalExpert
from router.dispatch import DistributedExperts
from router.placement_map import HostKey, MapVersion, PlacementMap
from router.transport.connect import connect
from router.transport.frames import ExpertsRequest
from router.transport.patient_poll import PatientPoll
from tests.benchmarks.hop_host import APPLICATION, BY_THREAD, HIDDEN_SIZE, IN_PLACE, NODE, SECRET, hop_host
from tests.benchmarks.results import machine, write_section

PAYLOADS = {"2 KB": 1, "128 KB": 64, "512 KB": 256}  # tokens of 512 float32
NUM_EXPERTS, TOP_K = 64, 6
TURNS, CALLS_PER_TURN, WARM_UP = 40, 25, 3
BARE, MEMORY, EXPERTS, THREAD, TCP, ACTORS = "bare", "shared memory", "dispatch, combine", "compute thread", "TCP", "Ray actor calls"


def fan_out_bare(bares, rows):
    num_rows = len(rows)
    for bare in bares:
        bare.request[:num_rows] = rows
        os.eventfd_write(bare.there, num_rows)
    poll = bares[0].poll
    num_waiting = len(bares)
    while num_waiting:
        for fd, _ in poll.poll():
            os.eventfd_read(fd)
            num_waiting -= 1


def fan_out_over_channels(channels, request, sequences):
    for channel in channels.by_fd.values():
        channel.send(next(sequences), 1, request)
    num_waiting = len(channels.by_fd)
    while num_waiting:
        for fd in channels.poll.wait(10.0, num_waiting):
            channel = channels.by_fd[fd]
            answer = channel.receive()
            if answer is not None:
                assert answer.partial.shape == request.hidden.shape
                channel.release(answer.sequence)
                num_waiting -= 1


class Channels:
    """One to each host, and what waits for them."""

    def __init__(self, channels):
        self.by_fd = {channel.fileno(): channel for channel in channels}
        self.poll = PatientPoll()
        for fd in self.by_fd:
            self.poll.register(fd)


def fan_out_over_experts(experts, hidden, routing):
    assert experts.combine(experts.dispatch(IN_PLACE, hidden, routing)).shape == hidden.shape


def open_experts(endpoints):
    """Half of each layer's experts on each host."""
    hosts = {HostKey(f"host-{index}", 1): endpoint for index, endpoint in enumerate(endpoints)}
    keys = list(hosts)
    held = {LogicalExpert(IN_PLACE, expert): (keys[expert % len(keys)],) for expert in range(NUM_EXPERTS)}
    experts = DistributedExperts(lambda _host, endpoint: connect(endpoint, NODE, SECRET, APPLICATION))
    experts.adopt(PlacementMap(MapVersion(1, 1), hosts, held))
    return experts


def routing_of(num_tokens):
    """Every token has experts on both hosts."""
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(NUM_EXPERTS // 2), (num_tokens, 1)), axis=1)[:, : TOP_K // 2]
    ids = torch.from_numpy(np.concatenate([2 * rows, 2 * rows + 1], axis=1))
    return Routing(ids, torch.full(ids.shape, 1 / TOP_K))


def sides_of(num_tokens, bares, channels_of, experts, actors, sequences):
    """By name, a function that makes one hop."""
    payload = np.random.default_rng(0).random((num_tokens, HIDDEN_SIZE), np.float32)
    hidden, routing = torch.from_numpy(payload), routing_of(num_tokens)
    here, by_thread = (
        ExpertsRequest(layer, MapVersion(1, 1), hidden, torch.zeros(num_tokens, TOP_K, dtype=torch.int16), torch.ones(num_tokens, TOP_K))
        for layer in (IN_PLACE, BY_THREAD)
    )
    sides = {
        BARE: lambda: fan_out_bare(bares, payload),
        MEMORY: lambda: fan_out_over_channels(channels_of[MEMORY], here, sequences),
        EXPERTS: lambda: fan_out_over_experts(experts, hidden, routing),
        THREAD: lambda: fan_out_over_channels(channels_of[MEMORY], by_thread, sequences),
        TCP: lambda: fan_out_over_channels(channels_of[TCP], by_thread, sequences),
    }
    return {**sides, ACTORS: lambda: fan_out_over_actors(actors, payload)} if actors else sides


def fan_out_over_actors(actors, payload):
    import ray

    for answer in ray.get([actor.echo.remote(payload) for actor in actors]):
        assert answer.shape == payload.shape


def start_actors(stack):
    """Two actors that answer what they are given."""
    import ray

    class EchoActor:
        """The other side of the comparison."""

        def echo(self, payload):
            return payload

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    stack.callback(ray.shutdown)
    actors = [ray.remote(num_cpus=0)(EchoActor).remote() for _ in range(2)]
    for actor in actors:
        ray.get(actor.echo.remote(None))
    return actors


def measure(sides):
    """Medians in seconds; the sides take turns of a few milliseconds each."""
    times = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, hop in sides.items():
            for call in range(WARM_UP + CALLS_PER_TURN):
                started = time.perf_counter()
                hop()
                if call >= WARM_UP:
                    times[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def table(medians_of):
    """Rows of a Markdown table; medians_of: by payload, by side, in seconds."""
    names = list(next(iter(medians_of.values())))
    ratios = [f"{MEMORY} / {BARE}", f"{EXPERTS} / {BARE}", *([f"{ACTORS} / {MEMORY}"] if ACTORS in names else [])]
    lines = [f"| payload per host | {' | '.join(names)} | {' | '.join(ratios)} |", "| --- |" + " ---: |" * (len(names) + len(ratios))]
    for label, medians in medians_of.items():
        figures = [f"{medians[name] * 1e6:.0f}" for name in names]
        figures += [f"{medians[MEMORY] / medians[BARE]:.2f}", f"{medians[EXPERTS] / medians[BARE]:.2f}"]
        figures += [f"{medians[ACTORS] / medians[MEMORY]:.1f}"] if ACTORS in names else []
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    sequences = itertools.count(1 << 32)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        hosts = [stack.enter_context(hop_host()) for _ in range(2)]
        endpoints, bares = [endpoint for _, endpoint, _ in hosts], [bare for _, _, bare in hosts]
        bares[0].poll = select.poll()
        for bare in bares:
            bares[0].poll.register(bare.back, select.POLLIN)
        channels_of = {
            name: Channels(
                [stack.enter_context(contextlib.closing(connect(endpoint, node_id, SECRET, APPLICATION))) for endpoint in endpoints]
            )
            for name, node_id in ((MEMORY, NODE), (TCP, "elsewhere"))
        }
        experts = stack.enter_context(contextlib.closing(open_experts(endpoints)))
        actors = [] if options.without_ray else start_actors(stack)
        medians_of = {
            label: measure(sides_of(num_tokens, bares, channels_of, experts, actors, sequences)) for label, num_tokens in PAYLOADS.items()
        }
    print(table(medians_of))
    if options.write:
        about = (
            "`python -m tests.benchmarks.hop --write`: router to two host processes and back, p50 in microseconds, the sides in turns of "
            f"{CALLS_PER_TURN} hops within one run; {machine()}; load average before the run {load:.1f}.\n\n"
            "The floor has two levels from run to run, about 20 us and 40 to 65 us, "
            "most likely by whether the processes share one core.\n\n"
        )
        write_section("Hop", about + table(medians_of))


if __name__ == "__main__":
    main()
