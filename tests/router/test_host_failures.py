"""Real host processes that are stopped and killed under a stream of tokens: how long it stands still. Two replicas of each expert.

`python -m tests.router.test_host_failures` prints the gaps, in milliseconds.
"""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from model.experts import ExpertSlots, LocalExperts
from router.dispatch import DistributedExperts
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.transport.connect import connect
from tests.router.expert_cluster import assert_close, key, make_batch, make_experts, wait_until
from tests.router.expert_process import APPLICATION, NODE, SECRET
from tests.router.transport.processes import start

torch.set_num_threads(1)

NUM_EXPERTS = 8
NUM_HOPS = 20  # layers of a token
HOSTS = (key("a"), key("b"), key("c"))
MAX_GAP_S = 0.5


@dataclass
class Hosts:
    """Three processes, and a map by which each expert is on two of them."""

    processes: dict[HostKey, "subprocess.Popen[str]"]
    endpoints: dict[HostKey, Endpoint]

    def map(self, n: int, hosts: tuple[HostKey, ...] = HOSTS, num_replicas: int = 2) -> PlacementMap:
        experts = sorted(make_experts(NUM_EXPERTS))
        placed = {
            expert: tuple(hosts[(expert.expert + replica) % len(hosts)] for replica in range(min(num_replicas, len(hosts))))
            for expert in experts
        }
        return PlacementMap(MapVersion(1, n), {host: self.endpoints[host] for host in hosts}, placed)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with running_hosts() as running:
        yield running


@contextlib.contextmanager
def running_hosts() -> Iterator[Hosts]:
    processes = {host: start("-m", "tests.router.expert_process", str(NUM_EXPERTS)) for host in HOSTS}
    try:
        yield Hosts(processes, {host: Endpoint(**json.loads(process.stdout.readline())) for host, process in processes.items()})
    finally:
        for process in processes.values():
            process.kill()
            process.wait(30)
            process.stdin.close()
            process.stdout.close()


class Stream:
    """Tokens of one batch of 16 sequences, one after another; every answer is compared with the truth."""

    def __init__(self, hosts: Hosts, node_id: str, num_replicas: int = 2) -> None:
        self.published = hosts.map(1, num_replicas=num_replicas)
        self.router = DistributedExperts(lambda _, end: connect(end, node_id, SECRET, APPLICATION), lambda: self.published)
        self.router.adopt(self.published)
        self._batches = [make_batch(16, NUM_EXPERTS, 3, seed) for seed in range(4)]
        local = LocalExperts(ExpertSlots(make_experts(NUM_EXPERTS).items()))
        self._expected = [local.combine(local.dispatch(1, *batch)) for batch in self._batches]
        self.gaps_s: list[float] = []
        wait_until(lambda: self.token() is None and all(self.router._links.get(host) for host in HOSTS), 30.0)

    def token(self) -> None:
        self.router.adopt(self.published)
        started = time.monotonic()
        answers = [self.router.combine(self.router.dispatch(1, *self._batches[hop % 4])) for hop in range(NUM_HOPS)]
        self.gaps_s.append(time.monotonic() - started)
        for hop, answer in enumerate(answers):
            assert_close(answer, self._expected[hop % 4])

    def run_until(self, is_over: Callable[[], bool], timeout_s: float = 30.0) -> float:
        """The longest gap until it is so, in seconds."""
        self.gaps_s.clear()
        wait_until(lambda: self.token() is None and is_over(), timeout_s)
        return max(self.gaps_s)


@contextlib.contextmanager
def stream(hosts: Hosts, node_id: str, num_replicas: int = 2) -> Iterator[Stream]:
    running = Stream(hosts, node_id, num_replicas)
    try:
        yield running
    finally:
        running.router.close()


def after(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def stop_gap_s(hosts: Hosts, running: Stream, victim: HostKey, stopped_s: float) -> float:
    """The longest gap while `victim` is stopped for a while in mid-stream, up to when it is trusted again."""
    process = hosts.processes[victim]
    timer = after(0.05, lambda: process.send_signal(signal.SIGSTOP))
    gap_s = running.run_until(lambda: victim in running.router.suspects)
    timer.join()
    assert running.router.dead_hosts == frozenset()
    usual_s = running.run_until(after_s(stopped_s))
    assert usual_s < MAX_GAP_S, "who is suspect is avoided from the start"
    process.send_signal(signal.SIGCONT)
    return max(gap_s, running.run_until(lambda: not running.router.suspects))


def after_s(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def kill_gap_s(hosts: Hosts, running: Stream, victim: HostKey) -> float:
    timer = after(0.05, hosts.processes[victim].kill)
    gap_s = running.run_until(lambda: victim in running.router.dead_hosts)
    timer.join()
    return gap_s


def wait_for_map_s(hosts: Hosts, running: Stream, victim: HostKey, repaired: PlacementMap) -> float:
    """`victim` is killed, and its experts are nowhere else until a map says so: how long after that the stream goes on."""
    hosts.processes[victim].kill()
    published_at: list[float] = []

    def publish() -> None:
        running.published = repaired
        published_at.append(time.monotonic())

    timer = after(0.3, publish)
    gap_s = running.run_until(lambda: running.router.acknowledged == repaired.version)
    timer.join()
    assert gap_s > 0.2, "it had to wait"
    return time.monotonic() - published_at[0]


@pytest.mark.parametrize("node_id", [NODE, "node-2"], ids=["shared-memory", "tcp"])
def test_a_host_that_is_stopped_and_one_that_is_killed_hold_a_stream_up_for_less_than_half_a_second(hosts: Hosts, node_id: str):
    with stream(hosts, node_id) as running:
        usual_s = running.run_until(after_s(0.2))
        assert stop_gap_s(hosts, running, HOSTS[0], 0.5) < usual_s + MAX_GAP_S
        links = running.router._links
        before = [links.get(host) for host in HOSTS]
        assert stop_gap_s(hosts, running, HOSTS[1], 0.2) < usual_s + MAX_GAP_S
        assert [links.get(host) for host in HOSTS] == before, "no channel was closed"
        assert kill_gap_s(hosts, running, HOSTS[2]) < usual_s + MAX_GAP_S
        running.published = hosts.map(2, HOSTS[:2], num_replicas=1)
        running.run_until(lambda: not running.router.suspects)
        assert running.router.dead_hosts == frozenset()
        assert wait_for_map_s(hosts, running, HOSTS[0], hosts.map(3, HOSTS[1:2])) < MAX_GAP_S


def main() -> None:
    for name, node_id in (("shared memory", NODE), ("tcp", "node-2")):
        stops, kills = [], []
        for _ in range(2):
            with running_hosts() as hosts, stream(hosts, node_id) as running:
                usual_s = running.run_until(after_s(0.5))
                stops += [stop_gap_s(hosts, running, victim, 1.0) for victim in HOSTS[:2]]
                kills.append(kill_gap_s(hosts, running, HOSTS[2]))
        stopped, killed = ([round(1000 * gap_s) for gap_s in gaps] for gaps in (stops, kills))
        print(f"{name}: usual longest gap {1000 * usual_s:.0f} ms, SIGSTOP {stopped} ms, kill -9 {killed} ms")


if __name__ == "__main__":
    main()
