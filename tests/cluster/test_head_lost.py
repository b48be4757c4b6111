"""The head of a Ray with GCS fault tolerance is lost, twice: streams on worker nodes go on, and when it is back scaling works again.

The worker nodes are in a network namespace of their own, so that a stream's proxy is certain: one there, or the head's. The proxies are
HAProxy, as in the manifests. Serve's Python proxy would not do: an answer that ends while it is owed to a lost proxy of that kind stops
its gateway until there is a head again (Ray 2.60 waits in the actor's event loop for the dead caller to take its last items).
"""

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import httpx
import pytest

from cluster.client import ask_json, get_json
from tests.cluster.deploy import deploy
from tests.cluster.http_stream import HttpStream
from tests.cluster.namespaces import two_sides
from tests.cluster.ray_nodes import Node, RayNodes, wait_until
from tests.cluster.replicas import pids_of
from tests.cluster.streams import Stream, Streams
from tests.cluster.test_partition import ServedApp
from tests.cluster_unit.redis_server import BINARY, RedisServer
from tests.tiny_models import OracleGreedy, assert_greedy_equal, oracle, oracle_greedy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPTS = [list(range(start, start + 6)) for start in range(5, 9)]
NUM_TOKENS = 130
NUM_SHORT = 8
RECOVERY_S = 90.0
CONFIG = {
    "security": {"insecure": True},
    "gateway": {"cpus": 0.1},
    "coordinator": {"cpus": 0.1},
    "router": {"cpus": 0, "resources": {"worker": 0.001}},
    "expert_host": {"cpus": 0, "resources": {"shoal_expert_host": 1}},
    "autoscaling": {"expert_host": {"min_replicas": 2, "max_replicas": 2, "ceiling": 4, "reaction_s": 0.5}},
}


@dataclass
class Headed:
    """A Ray whose head can be lost; `app` is reached through proxies of worker nodes, `through_head` through the head's."""

    nodes: RayNodes
    flags: list[str]
    store: dict[str, str]
    head: Node
    app: ServedApp
    through_head: ServedApp

    def lose_head(self) -> None:
        """All its processes at once, as a node's power goes."""
        self.head.kill()

    def bring_back(self) -> None:
        """A new head at the old address, over the same Redis; returns when the workers have joined it."""
        self.head = self.nodes.start_head(self.flags, **self.store)
        wait_until(lambda: self.nodes.num_alive() == 3, "the workers do not join the new head")

    def hosts(self) -> list[dict[str, Any]]:
        """As the Coordinator knows them."""
        hosts: list[dict[str, Any]] = get_json(f"{self.app.http}/cluster/hosts")
        return hosts

    def wait_for_hosts(self, number: int) -> float:
        """The seconds until so many serve."""

        def serve() -> bool:
            hosts = self.hosts()
            return len(hosts) == number and all(host["published"] for host in hosts)

        return wait_until(serve, f"not {number} hosts", RECOVERY_S)


@pytest.fixture(scope="module")
def headed(tmp_path_factory) -> Iterator[Headed]:
    if BINARY is None:
        pytest.skip("there is no redis-server on this machine")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    directory, password = tmp_path_factory.mktemp("headed"), uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch, two_sides() as sides:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # this process asks the head too
        with RedisServer(directory, password=password, host=sides.near_ip) as redis, RayNodes(sides.near_ip, haproxy=True) as nodes:
            flags = [f"--redis-password={password}"]
            store = {"RAY_REDIS_ADDRESS": f"{sides.near_ip}:{redis.port}", "RAY_external_storage_namespace": uuid.uuid4().hex}
            head = nodes.start_head(flags, **store)
            nodes.start_worker(1, {"worker": 1, "shoal_expert_host": 2}, sides.far_ip, sides.far_prefix)
            nodes.start_worker(0, {"worker": 1, "shoal_expert_host": 2}, sides.far_ip, sides.far_prefix)
            tree = {**CONFIG, "name": f"headed-{os.getpid()}", "state_store": {"redis_url": redis.url}}
            http, grpc_port = deploy(nodes, directory, tree)
            through_head = ServedApp(tree["name"], f"http://{sides.near_ip}:{http}", f"{sides.near_ip}:{grpc_port}")
            assert any(title.startswith("ray::HAProxyManager") for title in head.titles())
            app = replace(through_head, http=f"http://{sides.far_ip}:{http}", grpc=f"{sides.far_ip}:{grpc_port}")
            yield Headed(nodes, flags, store, head, app, through_head)


@pytest.fixture(scope="module")
def expected() -> list[OracleGreedy]:
    return [oracle_greedy(oracle("v2-lite"), prompt, NUM_TOKENS) for prompt in PROMPTS]


def check(answers: list[Stream], expected: list[OracleGreedy]) -> None:
    for answer, right in zip(answers, expected, strict=True):
        assert assert_greedy_equal(answer.tokens, right.token_ids, right.margins) is None


def test_streams_outlive_the_head_and_scaling_works_when_it_is_back(headed: Headed, expected, record_property):
    app = headed.app
    before = {host["id"] for host in headed.hosts()}
    assert len(before) == 2
    streams, over_http = Streams(app, PROMPTS, NUM_TOKENS), HttpStream(app, PROMPTS[0], NUM_TOKENS)
    by_head, by_head_over_http = (
        Streams(headed.through_head, PROMPTS[:1], NUM_TOKENS),
        HttpStream(headed.through_head, PROMPTS[0], NUM_TOKENS),
    )
    streams.wait_for_tokens(4 * len(PROMPTS))
    by_head.wait_for_tokens(4)
    for stream in (over_http, by_head_over_http):
        stream.wait_until_begun()

    headed.lose_head()
    with pytest.raises(grpc.RpcError) as lost:  # its connection ended at the head: no other request fails
        by_head.finish()
    assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(httpx.HTTPError):
        by_head_over_http.finish()
    # What begins while there is no head is answered, and what an operator sets is taken; nothing can start, though.
    short = Streams(app, PROMPTS, NUM_SHORT).finish()
    assert [answer.tokens for answer in short] == [right.token_ids[:NUM_SHORT] for right in expected]
    assert HttpStream(app, PROMPTS[1], NUM_SHORT).finish() == expected[1].token_ids[:NUM_SHORT]
    ask_json(f"{app.http}/cluster/scaling", {"expert_host": {"min_replicas": 3, "max_replicas": 3}}, "PATCH")
    assert {host["id"] for host in headed.hosts()} == before

    headed.bring_back()
    scaled_s = headed.wait_for_hosts(3)
    answers = streams.finish()
    check(answers, expected)
    assert over_http.finish() == expected[0].token_ids
    assert before < {host["id"] for host in headed.hosts()}  # nobody was replaced: the new head knows them all
    gap_s = max(one.longest_gap_s for one in answers)
    figures = f"a new host served {scaled_s:.1f} s after the head was back, longest gap of a stream {gap_s:.1f} s"
    print(figures)
    record_property("head lost", figures)


def test_a_host_that_dies_while_there_is_no_head_is_made_up_for_and_replaced_later(headed: Headed, expected, record_property):
    number = len(headed.hosts())
    streams = Streams(headed.app, PROMPTS, NUM_TOKENS)
    streams.wait_for_tokens(4 * len(PROMPTS))
    headed.lose_head()
    victim = pids_of(headed.app, "ExpertHost")[0]
    os.kill(victim, signal.SIGKILL)
    gone_s = wait_until(lambda: len(headed.hosts()) == number - 1, "the dead host keeps its lease")
    headed.bring_back()
    replaced_s = headed.wait_for_hosts(number)
    assert victim not in pids_of(headed.app, "ExpertHost")
    answers = streams.finish()
    check(answers, expected)
    figures = (
        f"a host killed without a head was missed after {gone_s:.1f} s, replaced {replaced_s:.1f} s after the head was back, "
        f"longest gap of a stream {max(one.longest_gap_s for one in answers):.1f} s"
    )
    print(figures)
    record_property("host lost without a head", figures)
