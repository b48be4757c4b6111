"""Hosts that answer nothing, heartbeats neither: their work goes elsewhere soon, nothing is closed, and they are welcome back."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from router.errors import ExpertsUnavailable
from router.transport.heartbeat import HeartbeatLimits
from tests.router.expert_cluster import LIMITS, Cluster, key, wait_until
from tests.router.test_dispatch import A, B, C, join, replicated_cluster, split_cluster, step

torch.set_num_threads(1)

HEARTBEAT = HeartbeatLimits(interval_s=0.01, dead_after_s=30.0)
QUICK = replace(LIMITS, silent_after_s=0.02)


def quick(cluster: Cluster) -> Cluster:
    """With heartbeats that are fast enough for a test."""
    for host in cluster.hosts.values():
        host.heartbeat = HEARTBEAT
    return cluster


def test_a_silent_host_s_work_goes_to_its_replica_and_so_does_all_that_follows():
    with quick(replicated_cluster()) as cluster:
        router = cluster.router(limits=QUICK)
        join(router, cluster.map())
        cluster.hosts[A].memory.freeze()
        for seed in range(8):
            step(router, cluster, seed=seed)
        assert router.suspects == {A}
        assert router.dead_hosts == frozenset()
        (channel,) = cluster.hosts[A].channels
        assert not channel._is_closed
        assert len(channel._in_flight) == 0
        num_held = len(cluster.hosts[A].memory._held)
        step(router, cluster, seed=9)
        assert len(cluster.hosts[A].memory._held) == num_held, "nothing more is sent to a suspect that has a replica"


def test_a_silent_host_is_trusted_as_soon_as_it_is_heard_and_its_late_answers_are_dropped():
    with quick(replicated_cluster()) as cluster:
        router = cluster.router(limits=QUICK)
        join(router, cluster.map())
        cluster.hosts[A].memory.freeze()
        for seed in range(8):
            step(router, cluster, seed=seed)
        num_frames = len(cluster.hosts[A].frames)
        cluster.hosts[A].memory.thaw()
        num_late = len(cluster.hosts[A].frames) - num_frames
        assert num_late > 0
        seeds = iter(range(100, 10_000))
        wait_until(lambda: step(router, cluster, seed=next(seeds)) is None and not router.suspects)
        wait_until(lambda: step(router, cluster, seed=next(seeds)) is None and len(cluster.hosts[A].frames) > num_frames + num_late)
        assert len(cluster.hosts[A].channels) == 1


def test_defaults_find_a_silent_host_in_a_third_of_a_second():
    with replicated_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, look_interval_s=0.05))
        join(router, cluster.map())
        cluster.hosts[A].memory.freeze()
        cluster.hosts[B].memory.freeze()
        thaw = threading.Timer(0.05, cluster.hosts[B].memory.thaw)
        thaw.start()
        started = time.monotonic()
        step(router, cluster, num_tokens=30)
        assert time.monotonic() - started < 2.0  # 0.3 s where nothing else runs
        assert router.suspects == {A}
        thaw.join()


def test_without_a_replica_a_silent_host_is_waited_for():
    with quick(split_cluster()) as cluster:
        router = cluster.router(limits=QUICK)
        join(router, cluster.map())
        cluster.hosts[A].memory.freeze()
        thaw = threading.Timer(0.2, cluster.hosts[A].memory.thaw)
        thaw.start()
        step(router, cluster)
        thaw.join()
        assert router.suspects == frozenset()
        assert len(cluster.hosts[A].frames) == len(cluster.hosts[A].channels) == 1


def test_a_newer_map_takes_a_silent_host_s_work_elsewhere():
    with quick(split_cluster()) as cluster:
        published = [cluster.map(n=1)]
        router = cluster.router(lambda: published[-1], limits=QUICK)
        join(router, published[-1])
        cluster.hosts[A].memory.freeze()

        def rebuild() -> None:
            cluster.add_host(C, cluster.hosts[A].slots.held())
            published.append(cluster.map(n=2))

        timer = threading.Timer(0.1, rebuild)
        timer.start()
        step(router, cluster)
        timer.join()
        assert router.suspects == {A}
        assert not cluster.hosts[A].frames


def test_a_host_that_stays_silent_is_lost_at_the_harder_limit_and_reached_anew():
    with split_cluster() as cluster:
        cluster.hosts[A].heartbeat = HeartbeatLimits(interval_s=0.01, dead_after_s=0.1)
        router = cluster.router(limits=QUICK)
        join(router, cluster.map())
        cluster.hosts[A].memory.freeze()
        timer = threading.Timer(0.25, cluster.hosts[A].memory.thaw)
        timer.start()
        step(router, cluster)
        timer.join()
        assert len(cluster.hosts[A].channels) > 1
        assert cluster.hosts[A].channels[0]._is_closed


def test_a_batch_is_not_taken_from_one_silent_host_to_the_next_without_end():
    cluster = Cluster(4)
    hosts = [key(f"host-{number}") for number in range(6)]
    for host in hosts:
        cluster.add_host(host, cluster.experts)
    with quick(cluster):
        router = cluster.router(limits=replace(QUICK, step_timeout_s=0.5))
        join(router, cluster.map())
        for host in hosts:
            cluster.hosts[host].memory.freeze()
        with pytest.raises(ExpertsUnavailable, match=r"host host-\d has not answered"):
            step(router, cluster, num_tokens=1, top_k=1)
        assert len(router.suspects) == 1 + QUICK.max_deaths


def test_hosts_that_stop_now_and_then_change_no_answer():
    chance = random.Random(5)
    with quick(replicated_cluster()) as cluster:
        router = cluster.router(limits=replace(QUICK, silent_after_s=0.005))
        join(router, cluster.map())
        is_over = threading.Event()

        def disturb() -> None:
            while not is_over.is_set():
                host = cluster.hosts[chance.choice((A, B))].memory
                host.freeze()
                is_over.wait(chance.uniform(0.0, 0.03))
                host.thaw()
                is_over.wait(chance.uniform(0.0, 0.01))

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for seed in range(150):
                step(router, cluster, seed=seed)
        finally:
            is_over.set()
            thread.join()
        for host in (A, B):  # a channel whose buffers were all set aside is opened anew; none is lost otherwise
            assert all(channel._num_abandoned == 64 for channel in cluster.hosts[host].channels[:-1])


def test_a_host_whose_process_has_ended_is_told_from_one_that_is_silent():
    with replicated_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        cluster.hosts[A].die()
        wait_until(lambda: step(router, cluster) is None and router.dead_hosts == {A})
        assert router.suspects == {A}
        cluster.hosts[A].is_down = False
        wait_until(lambda: step(router, cluster) is None and not router.suspects)
        assert router.dead_hosts == frozenset()
