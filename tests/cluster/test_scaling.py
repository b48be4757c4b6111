"""Hosts and routers follow their load through Serve's autoscaling: no error, no 503, every answer right, in both directions.

The hosts are metered (`tests.cluster.metered`): real, tiny weights, and a delay for each token's expert.
"""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from ray import serve

from cluster import app as application
from tests.cluster.conftest import App, Shoals
from tests.cluster.load import Load, ask_all
from tests.cluster.metered import MeteredExpertHost
from tests.tiny_models import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_TOKENS = 24
PROMPTS = [tuple(range(start, start + 6)) for start in range(5, 29)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny("v2-lite", tmp_path_factory.mktemp("v2-lite"))


def right_answers(app: App) -> dict[tuple[int, ...], list[int]]:
    return ask_all(app, PROMPTS, NUM_TOKENS)


def wait_for(what: Callable[[], bool], app: App, timeout_s: float) -> float:
    """The seconds that it took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < timeout_s, app.view()["events"][-20:]
        time.sleep(0.1)
    return time.monotonic() - started


def ids(view: dict[str, Any], members: str) -> set[str]:
    return {member["id"] for member in view[members]}


def is_idle(app: App, num_hosts: int) -> bool:
    """Hosts have nothing to do any more, and Serve neither starts nor stops one."""
    hosts = app.view()["hosts"]
    states = serve.status().applications[app.name].deployments["ExpertHost"].replica_states
    return len(hosts) == num_hosts and states == {"RUNNING": num_hosts} and all(host["busy_share"] < 0.05 for host in hosts)


def test_hosts_follow_their_load_up_and_down(shoals: Shoals, checkpoint, monkeypatch, record_property):
    monkeypatch.setattr(application, "ExpertHostReplica", MeteredExpertHost)
    scaling = {"min_replicas": 2, "max_replicas": 4, "busy": 0.4, "reaction_s": 0.5, "cooldown_s": 5.0}
    settings = {
        "autoscaling__expert_host": scaling,
        "coordinator__exchange_interval_s": 0.5,
        "coordinator__long_window_s": 5.0,
        "placement__rebalance_interval_s": 2.0,
    }
    with shoals.running(checkpoint, "metered", **settings) as app:
        answers = right_answers(app)
        wait_for(lambda: is_idle(app, 2), app, 60)  # those were a load too
        before = ids(app.view(), "hosts")

        def a_new_host_serves() -> bool:
            return any(host["id"] not in before and host.get("num_frames") for host in app.view()["hosts"])

        with Load(app, answers, num_clients=8, num_tokens=NUM_TOKENS) as load:
            first_frame_s = wait_for(a_new_host_serves, app, 60)
            wait_for(lambda: len(app.view()["hosts"]) == 4, app, 60)
        fewer_s = wait_for(lambda: len(app.view()["hosts"]) == 2, app, 60)
        with Load(app, answers, num_clients=1, num_tokens=NUM_TOKENS) as after:
            wait_for(lambda: after.num_answers >= 3, app, 60)
        wait_for(lambda: {line["direction"] for line in app.view()["decisions"] if line["kind"] == "scaling"} == {"up", "down"}, app, 20)
        assert 'shoal_scaling_decisions_total{direction="up",' in httpx.get(f"{app.http}/metrics", timeout=10).text
        figures = f"first frame of a new host {first_frame_s:.1f} s after the load's step, 4 -> 2 hosts {fewer_s:.1f} s after its end"
        print(figures, f"({load.num_answers} answers)")
        record_property("scaling", figures)
        assert not load.problems
        assert not after.problems


def test_routers_follow_their_load_and_no_expert_moves(shoals: Shoals, checkpoint, monkeypatch, record_property):
    monkeypatch.setattr(application, "ExpertHostReplica", MeteredExpertHost)
    scaling = {"min_replicas": 1, "max_replicas": 3, "num_waiting": 1.0, "kv_use": 0.9, "reaction_s": 0.5, "cooldown_s": 5.0}
    settings = {
        "autoscaling__router": scaling,
        "router__max_running": 2,
        "coordinator__exchange_interval_s": 0.5,
        "placement__rebalance_interval_s": 3600.0,  # what moves then moves because of routers
    }
    with shoals.running(checkpoint, "routers", **settings) as app:
        answers = right_answers(app)
        before = app.view()["placement"]["layers"]
        with Load(app, answers, num_clients=12, num_tokens=NUM_TOKENS) as load:
            more_s = wait_for(lambda: len(app.view()["routers"]) == 3, app, 90)
            enough = load.num_answers + 24
            wait_for(lambda: load.num_answers >= enough, app, 90)
        with Load(app, answers, num_clients=2, num_tokens=NUM_TOKENS) as light:
            fewer_s = wait_for(lambda: len(app.view()["routers"]) == 1, app, 90)
        assert app.view()["placement"]["layers"] == before
        figures = f"1 -> 3 routers {more_s:.1f} s after the load's step, 3 -> 1 {fewer_s:.1f} s after its end"
        print(figures, f"({load.num_answers} and {light.num_answers} answers)")
        record_property("scaling", figures)
        assert not load.problems
        assert not light.problems
