"""Everything of an application is killed but Redis: it comes back with the placement it had, under a higher version."""

import os
import signal

import pytest

from tests.cluster.conftest import Shoals
from tests.cluster.load import ask_all
from tests.cluster.replicas import is_whole, pids_of
from tests.cluster.test_scaling import NUM_TOKENS, PROMPTS, right_answers, wait_for
from tests.cluster_unit.redis_server import BINARY, RedisServer
from tests.tiny_models import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ROLES = ("Coordinator", "ExpertHost", "Router", "Gateway")


@pytest.fixture
def redis_server(tmp_path):
    if BINARY is None:
        pytest.skip("there is no redis-server on this machine")
    server = RedisServer(tmp_path).start()
    yield server
    server.stop()


def sizes(placement: dict) -> list[int]:
    """Experts of each host, ascending: hosts that come back have new names."""
    counts: dict[str, int] = {}
    for layer in placement["layers"].values():
        for hosts in layer.values():
            for host in hosts:
                counts[host] = counts.get(host, 0) + 1
    return sorted(counts.values())


def groups(placement: dict) -> set[frozenset[tuple[str, str]]]:
    """The experts that stand together, whatever their host is called."""
    held: dict[str, set[tuple[str, str]]] = {}
    for layer, experts in placement["layers"].items():
        for expert, hosts in experts.items():
            for host in hosts:
                held.setdefault(host, set()).add((layer, expert))
    return {frozenset(experts) for experts in held.values()}


def test_with_redis_the_placement_outlives_every_process(shoals: Shoals, redis_server, tmp_path):
    settings = {"state_store__redis_url": redis_server.url, "expert_host__replicas": 3, "placement__min_replicas": 2}
    with shoals.running(write_tiny("v2-lite", tmp_path / "v2-lite"), "lasting", **settings) as app:
        answers = right_answers(app)
        wait_for(lambda: is_whole(app, 3, 2) and app.view()["state_store"]["error"] is None, app, 60)
        before = app.view()["placement"]
        victims = [pid for role in ROLES for pid in pids_of(app, role)]
        assert len(victims) == 6
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

        def is_back() -> bool:
            try:
                return not set(victims) & {pid for role in ROLES for pid in pids_of(app, role)} and is_whole(app, 3, 2)
            except Exception:  # whatever Serve raises while there is no Coordinator
                return False

        until_back_s = wait_for(is_back, app, 120)
        after = app.view()["placement"]
        print(f"whole again {until_back_s:.1f} s after everything was killed")
        assert after["version"] > before["version"]
        assert sizes(after) == sizes(before)
        assert groups(after) == groups(before)
        assert ask_all(app, PROMPTS, NUM_TOKENS) == answers
