"""Hosts, routers and the Coordinator die or freeze under streams of real weights: no request fails, every answer is the undisturbed one.

The gaps are printed and kept as properties of the test; `python -m tests.benchmarks.disturbances` makes the table.
"""

import os
import signal
import threading
import time

import pytest
from transformers import AutoTokenizer

from tests.cluster.conftest import App, Shoals
from tests.cluster.replicas import is_whole, pids_of
from tests.cluster.streams import Disturbance, Stream, Streams, disturbed
from tests.demo_checkpoint import demo_paths

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_STREAMS, NUM_TOKENS, NUM_HOSTS = 16, 48, 3
FROZEN_S = 10.0
TEXTS = ["The capital of France is", "Water boils when", "A good friend", "In the beginning"]


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_paths().mixtral)
    return [tokenizer(f"{text} {number}:").input_ids for number in range(NUM_STREAMS // len(TEXTS)) for text in TEXTS]


@pytest.fixture(scope="module")
def app(shoals: Shoals):
    settings = {"expert_host__replicas": NUM_HOSTS, "router__replicas": 2, "placement__min_replicas": 2}
    with shoals.running(demo_paths().mixtral, "elastic", **settings) as running:
        wait_until_whole(running, 2)
        yield running


@pytest.fixture(scope="module")
def undisturbed(app: App) -> list[Stream]:
    return Streams(app, prompts(), NUM_TOKENS).finish()


def wait_until_whole(app: App, min_replicas: int, timeout_s: float = 90.0) -> None:
    until = time.monotonic() + timeout_s
    while not is_whole(app, NUM_HOSTS, min_replicas):
        assert time.monotonic() < until, app.view()["events"]
        time.sleep(0.2)


def show(record_property, disturbance: Disturbance) -> None:
    print(disturbance)
    record_property("disturbance", str(disturbance))


def test_a_killed_host_is_noticed_by_no_stream_and_replaced(app, undisturbed, record_property):
    victim = pids_of(app, "ExpertHost")[0]
    before = {host["id"] for host in app.view()["hosts"]}

    def replaced() -> bool:
        hosts = {host["id"] for host in app.view()["hosts"]}
        return len(hosts & before) == NUM_HOSTS - 1 and is_whole(app, NUM_HOSTS, 2)

    show(record_property, disturbed("host killed", app, prompts(), undisturbed, lambda: os.kill(victim, signal.SIGKILL), replaced))


def test_a_frozen_host_is_noticed_by_no_stream(app, undisturbed, record_property):
    wait_until_whole(app, 2)
    victim = pids_of(app, "ExpertHost")[0]
    thaw = threading.Timer(FROZEN_S, os.kill, (victim, signal.SIGCONT))

    def freeze() -> None:
        os.kill(victim, signal.SIGSTOP)
        thaw.start()

    try:
        show(record_property, disturbed("host frozen for 10 s", app, prompts(), undisturbed, freeze))
    finally:
        thaw.join()
    wait_until_whole(app, 2)


def test_a_killed_router_is_noticed_by_no_stream(app, undisturbed, record_property):
    wait_until_whole(app, 2)
    victim = pids_of(app, "Router")[0]
    show(record_property, disturbed("router killed", app, prompts(), undisturbed, lambda: os.kill(victim, signal.SIGKILL)))
    until = time.monotonic() + 90
    while len(app.view()["routers"]) < 2:
        assert time.monotonic() < until, app.view()["events"]
        time.sleep(0.2)


def test_a_killed_coordinator_comes_back_and_versions_rise(app, undisturbed, record_property):
    wait_until_whole(app, 2)
    (victim,) = pids_of(app, "Coordinator")
    before = app.view()["placement"]["version"]

    def is_back() -> bool:
        try:
            view = app.view()
        except Exception:  # whatever Serve raises while there is none
            return False
        version = view["placement"]["version"]
        return victim not in pids_of(app, "Coordinator") and version is not None and version > before

    show(record_property, disturbed("Coordinator killed", app, prompts(), undisturbed, lambda: os.kill(victim, signal.SIGKILL), is_back))
    wait_until_whole(app, 2)


def test_with_one_replica_the_experts_of_a_killed_host_are_loaded_elsewhere(shoals: Shoals, record_property):
    with shoals.running(demo_paths().mixtral, "alone", expert_host__replicas=NUM_HOSTS) as app:
        wait_until_whole(app, 1)
        before = Streams(app, prompts(), NUM_TOKENS).finish()
        victim = pids_of(app, "ExpertHost")[0]
        kill = disturbed("host killed, one replica", app, prompts(), before, lambda: os.kill(victim, signal.SIGKILL))
        show(record_property, kill)
