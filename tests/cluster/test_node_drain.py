"""A node leaves as a kubelet makes it leave: the manifests' preStop command, SIGTERM, and SIGKILL at the end of their grace period.

It holds hosts, a router and the gateway, and a replacement joins as KubeRay would add it. No stream notices. The ingress is HAProxy,
as in the manifests.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.client import get_json
from tests.cluster.deploy import deploy
from tests.cluster.ray_nodes import REPOSITORY, Node, RayNodes
from tests.cluster.streams import Streams
from tests.cluster.test_partition import ServedApp
from tests.tiny_models import assert_greedy_equal, oracle, oracle_greedy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

PROMPTS = [list(range(start, start + 6)) for start in range(5, 9)]
NUM_TOKENS = 220
# What the pod has that leaves, and the one that comes in its place.
POD = {"shoal_expert_host": 2.0, "shoal_router": 1.0, "door": 1.0}
REST = {"shoal_expert_host": 1.0, "shoal_router": 1.0}
CONFIG = {
    "name": "moving",
    "security": {"insecure": True},
    "gateway": {"cpus": 0, "resources": {"door": 1}, "drain_timeout_s": 120},
    "coordinator": {"cpus": 0.1},
    # Less than the streams last: those of the router that leaves go on at another one.
    "router": {"replicas": 2, "cpus": 0, "resources": {"shoal_router": 1}, "drain_timeout_s": 5},
    "expert_host": {"replicas": 3, "cpus": 0, "resources": {"shoal_expert_host": 1}},
    "placement": {"drain_timeout_s": 60},
}


@dataclass(frozen=True)
class PodEnd:
    """How the manifests let a worker pod end."""

    command: list[str]
    grace_s: float


def pod_end() -> PodEnd:
    """The same for every worker group of the base."""
    documents = yaml.safe_load_all((REPOSITORY / "k8s/base/rayservice.yaml").read_text())
    service = next(document for document in documents if document["kind"] == "RayService")
    found = []
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        found.append(PodEnd(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"], pod["terminationGracePeriodSeconds"]))
    assert all(end == found[0] for end in found)
    return found[0]


class Kubelet:
    """Ends a node's pod. `run` waits for the end; `said` is what the preStop command printed."""

    def __init__(self, node: Node, log: Path) -> None:
        self._node = node
        self._end = pod_end()
        self._log = log
        self._started_s = time.monotonic()
        shoal, *flags = self._end.command
        assert shoal == "shoal"
        command = [sys.executable, "-m", "cluster.cli", *flags, "--node-id", node.raylet_id()]
        with log.open("wb") as output:
            self._pre_stop = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)

    def wait(self) -> float:
        """The seconds that the pod took to end, within its grace period."""
        status = self._pre_stop.wait(self._left_s())
        assert status == 0, self.said
        self._node.process.send_signal(signal.SIGTERM)
        self._node.process.wait(self._left_s())
        return time.monotonic() - self._started_s

    @property
    def said(self) -> str:
        """So far."""
        return self._log.read_text()

    def close(self) -> None:
        """Ends the command where the test has failed before."""
        self._pre_stop.kill()
        self._pre_stop.wait()

    def _left_s(self) -> float:
        return max(0.0, self._started_s + self._end.grace_s - time.monotonic())


def test_a_node_with_hosts_router_and_gateway_leaves_and_no_stream_notices(tmp_path, record_property):
    with RayNodes("127.0.0.1", haproxy=True) as nodes:
        nodes.start_head()
        leaving = nodes.start_worker(0, POD)
        nodes.start_worker(1, REST)
        http, grpc = deploy(nodes, tmp_path, CONFIG)
        app = ServedApp(CONFIG["name"], f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
        node_id = leaving.raylet_id()
        assert [host["node_id"] for host in get_json(f"{app.http}/cluster/hosts")].count(node_id) == 2
        assert [router["node_id"] for router in routers(app)].count(node_id) == 1
        expected = [oracle_greedy(oracle("v2-lite"), prompt, NUM_TOKENS) for prompt in PROMPTS]
        streams = Streams(app, PROMPTS, NUM_TOKENS)
        streams.wait_for_tokens(len(PROMPTS) * 10)

        kubelet = Kubelet(leaving, tmp_path / "pre-stop.log")
        try:
            nodes.start_worker(0, POD)
            took_s = kubelet.wait()
        finally:
            kubelet.close()
            print(kubelet.said)
        answers = streams.finish()
        figures = (
            f"the node left {took_s:.1f} s after its preStop, longest gap of a stream {max(one.longest_gap_s for one in answers):.1f} s"
        )
        print(figures)
        record_property("node drain", figures)

        for answer, right in zip(answers, expected, strict=True):
            assert assert_greedy_equal(answer.tokens, right.token_ids, right.margins) is None
        assert "2 ExpertHost, 1 Gateway, 1 Router, 1 proxy" in kubelet.said
        assert num_resubmissions(app) > 0
        hosts = get_json(f"{app.http}/cluster/hosts")
        assert len(hosts) == 3
        assert all(host["published"] and host["node_id"] != node_id for host in hosts)
        assert len(routers(app)) == 2
        assert all(router["node_id"] != node_id for router in routers(app))


def routers(app: ServedApp) -> list[dict]:
    return get_json(f"{app.http}/cluster/load")["routers"]


def num_resubmissions(app: ServedApp) -> float:
    """Requests that went on at another router."""
    families = text_string_to_metric_families(httpx.get(f"{app.http}/metrics", timeout=10).text)
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "shoal_request_resubmissions_total")
