"""Hosts added, removed, killed and rebalanced at random while clients ask: what an unlucky week looks like, in minutes."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from ray import serve

from tests.cluster.conftest import App
from tests.cluster.replicas import is_whole, pids_of

MIN_REPLICAS, MIN_HOSTS, MAX_HOSTS = 2, 2, 4
SETTINGS = {
    "placement__min_replicas": MIN_REPLICAS,
    "autoscaling__expert_host": {"min_replicas": MIN_HOSTS, "max_replicas": MAX_HOSTS, "reaction_s": 0.2, "cooldown_s": 1.0},
    "coordinator__exchange_interval_s": 0.5,
    "placement__rebalance_interval_s": 5.0,
}


def run_operations(app: App, number: int, seed: int, pause_s: float = 1.0) -> Counter[str]:
    """Does `number` operations, one each `pause_s` on average; how many of each kind. No host is killed while an expert stands alone."""
    draw = random.Random(seed)
    coordinator = serve.get_deployment_handle("Coordinator", app.name)
    done: Counter[str] = Counter()

    def set_hosts() -> str:
        hosts = float(draw.randint(MIN_HOSTS, MAX_HOSTS))
        coordinator.set_scaling.remote({"expert_host": {"min_replicas": hosts, "max_replicas": hosts}}).result(timeout_s=10)
        return f"set to {hosts:.0f} hosts"

    def rebalance() -> str:
        coordinator.rebalance.remote().result(timeout_s=10)
        return "rebalanced"

    def kill() -> str:
        pids = pids_of(app, "ExpertHost")
        if not pids or not is_whole(app, len(pids), MIN_REPLICAS):
            return rebalance()
        os.kill(draw.choice(pids), signal.SIGKILL)
        return "killed a host"

    for _ in range(number):
        operation: Callable[[], str] = draw.choice([set_hosts, rebalance, kill])
        done[operation()] += 1
        time.sleep(draw.uniform(0, 2 * pause_s))
    coordinator.set_scaling.remote({"expert_host": {"min_replicas": 3.0, "max_replicas": 3.0}}).result(timeout_s=10)
    return done


def is_consistent(app: App, num_hosts: int) -> bool:
    """Whether every host holds what it should and what is published, no more, and every expert has its replicas."""
    hosts = app.view()["hosts"]
    holds = all(host["ready"] == host["desired"] == host["published"] > 0 for host in hosts)
    return holds and is_whole(app, num_hosts, MIN_REPLICAS)
