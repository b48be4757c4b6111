"""What a hop costs: one router sends a token batch to two host processes and waits for both partial sums.

    python -m tests.benchmarks.hop

Shared memory, TCP, and beside them Ray actor calls with the same bytes, in turns within one run, so that whatever else the
machine does meets all three. Prints the median in microseconds and how many times faster than the actor calls each is.
The hosts hand each frame to a compute thread, as real ones do, which answers with the hidden states it was sent.

The last table, on 2 cores of an AMD EPYC without GPU, while other programs kept both busy (load average 6):

    payload per host | shared memory us | TCP us | actor calls us | shared memory x | TCP x
    2 KB             |              209 |    241 |           1352 |             6.5 |   5.6
    128 KB           |              239 |    513 |           9765 |            40.8 |  19.0
    512 KB           |              268 |   1208 |           8921 |            33.3 |   7.4
"""

import contextlib
import itertools
import select
import time

import numpy as np
import ray
import torch

from router.placement_map import MapVersion
from router.transport.connect import connect
from router.transport.frames import ExpertsRequest
from tests.router.transport.echo_host import COPY
from tests.router.transport.processes import echo_host

PAYLOADS = {"2 KB": 1, "128 KB": 64, "512 KB": 256}  # tokens of 512 float32
HIDDEN_SIZE, TOP_K = 512, 6
TURNS, CALLS_PER_TURN, WARM_UP = 10, 30, 5


@ray.remote(num_cpus=0)
class EchoActor:
    """The other side of the comparison."""

    def echo(self, payload):
        return payload


def fan_out_over_channels(channels, request, sequences):
    for channel in channels:
        channel.send(next(sequences), 1, request)
    waiting = list(channels)
    while waiting:
        for channel in select.select(waiting, [], [], 10.0)[0]:
            answer = channel.receive()
            if answer is not None:
                assert answer.partial.shape == request.hidden.shape
                channel.release(answer.sequence)
                waiting.remove(channel)


def fan_out_over_actors(actors, payload):
    for answer in ray.get([actor.echo.remote(payload) for actor in actors]):
        assert answer.shape == payload.shape


def sides_of(num_tokens, channels_of, actors, sequences):
    """By name, a function that makes one hop."""
    payload = np.random.default_rng(0).random((num_tokens, HIDDEN_SIZE), np.float32)
    request = ExpertsRequest(
        COPY,
        MapVersion(1, 1),
        torch.from_numpy(payload),
        torch.zeros(num_tokens, TOP_K, dtype=torch.int16),
        torch.ones(num_tokens, TOP_K),
    )
    sides = {name: lambda channels=channels: fan_out_over_channels(channels, request, sequences) for name, channels in channels_of.items()}
    return {**sides, "actor calls": lambda: fan_out_over_actors(actors, payload)}


def measure(sides):
    """Medians in seconds."""
    times = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, hop in sides.items():
            for call in range(WARM_UP + CALLS_PER_TURN):
                started = time.perf_counter()
                hop()
                if call >= WARM_UP:
                    times[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main():
    """Prints the table."""
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    sequences = itertools.count()
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        endpoints = [stack.enter_context(echo_host(node_id="here"))[1] for _ in range(2)]
        actors = [EchoActor.remote() for _ in range(2)]
        channels_of = {
            name: [stack.enter_context(contextlib.closing(connect(endpoint, node_id, b"secret", "app"))) for endpoint in endpoints]
            for name, node_id in (("shared memory", "here"), ("TCP", "elsewhere"))
        }
        print("payload per host | shared memory us | TCP us | actor calls us | shared memory x | TCP x")
        for label, num_tokens in PAYLOADS.items():
            medians = measure(sides_of(num_tokens, channels_of, actors, sequences))
            shared, tcp, actor = (medians[name] for name in ("shared memory", "TCP", "actor calls"))
            row = f"{shared * 1e6:16.0f} | {tcp * 1e6:6.0f} | {actor * 1e6:14.0f} | {actor / shared:15.1f} | {actor / tcp:5.1f}"
            print(f"{label:16} | {row}", flush=True)


if __name__ == "__main__":
    main()
