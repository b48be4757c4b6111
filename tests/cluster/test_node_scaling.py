"""Nodes follow the hosts, and hosts their load: Ray's own autoscaler brings nodes and takes them away, and no request notices.

Deployed as the KubeRay operator does it: the Serve config, through the dashboard's REST interface, on a head without a CPU.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.api.proto.shoal.v1 import cluster_pb2, cluster_pb2_grpc
from cluster.config import read_config
from cluster.serve_config import serve_config
from tests.cluster.autoscaling_ray import REPOSITORY, AutoscalingRay, NodeType
from tests.cluster.conftest import App
from tests.cluster.load import Load, ask_all
from tests.free_ports import free_port
from tests.tiny_models import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

# As the overlay has them: who asks for no CPU goes where its resource is, and nothing else goes to the experts' nodes.
OVERLAY = REPOSITORY / "k8s" / "overlays" / "cpu-demo" / "shoal.yaml"
NODE_TYPES = {
    "routers": NodeType({"CPU": 2, "shoal_router": 1}, min_workers=0, max_workers=2),
    "experts": NodeType({"CPU": 0, "shoal_expert_host": 2}, min_workers=0, max_workers=3),
}
NODE_TYPE_OF = {"Gateway": "routers", "Coordinator": "routers", "Router": "routers", "ExpertHost": "experts"}
IDLE_TIMEOUT_S = 3.0
NUM_TOKENS = 24
PROMPTS = [tuple(range(start, start + 6)) for start in range(5, 13)]
SETTINGS = {
    "name": "shoal",
    "state_store": {},
    "security": {"insecure": True},
    "autoscaling.expert_host": {"min_replicas": 2, "max_replicas": 4, "busy": 0.4, "reaction_s": 0.5, "cooldown_s": 10.0},
    "coordinator": {"exchange_interval_s": 0.5, "long_window_s": 5.0},
    "placement.rebalance_interval_s": 2.0,
}
WAIT_S = 90.0
HEALTHY = {"HEALTHY", "UPDATING", "UPSCALING", "DOWNSCALING"}


class Deployment:
    """The application on that Ray, seen from outside: through the dashboard and through its own gRPC."""

    def __init__(self, ray: AutoscalingRay, model: Path) -> None:
        self.ray = ray
        self._config = serve_config(read_config(OVERLAY, {"model.path": str(model), **SETTINGS}))
        http, grpc_port = free_port(), free_port()
        self._config["http_options"] |= {"host": "127.0.0.1", "port": http}
        self._config["grpc_options"] |= {"port": grpc_port}
        self._config["applications"][0]["import_path"] = "tests.cluster.metered_app:build"
        self.app = App("shoal", f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_port}")

    def deploy(self) -> None:
        httpx.put(f"{self.ray.dashboard}/api/serve/applications/", json=self._config, timeout=60).raise_for_status()

    def application(self) -> dict[str, Any]:
        """As Serve tells it; nothing of it must be in trouble."""
        details = httpx.get(f"{self.ray.dashboard}/api/serve/applications/", timeout=30).raise_for_status().json()
        application: dict[str, Any] = details["applications"].get("shoal", {"status": "DEPLOYING", "deployments": {}})
        assert application["status"] in ("DEPLOYING", "RUNNING"), application
        assert {deployment["status"] for deployment in application["deployments"].values()} <= HEALTHY, application
        return application

    def places(self) -> dict[str, Counter[str]]:
        """For each deployment: how many of its running replicas are on nodes of which type."""
        nodes = self.ray.nodes()
        running = {
            name: [replica["node_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]
            for name, deployment in self.application()["deployments"].items()
        }
        return {name: Counter(nodes.get(node_id, "head") for node_id in node_ids) for name, node_ids in running.items()}

    def num_nodes(self) -> Counter[str]:
        return Counter(self.ray.nodes().values())

    def wait_for(self, what: Callable[[], bool]) -> float:
        """The seconds that it took; the application must be in order all the while."""
        started = time.monotonic()
        while not what():
            waited_s = time.monotonic() - started
            assert waited_s < WAIT_S, (self.places(), self.num_nodes(), complaints(self.ray.logs))
            self.application()
            time.sleep(0.3)
        return time.monotonic() - started

    def assert_all_on_their_own_node_types(self) -> None:
        assert {name: set(nodes) for name, nodes in self.places().items()} == {name: {kind} for name, kind in NODE_TYPE_OF.items()}


def complaints(logs: Path) -> list[str]:
    """Lines of the autoscaler's and of Serve's logs that tell of an error."""
    files = [*logs.glob("monitor*"), *(logs / "serve").glob("*.log")]
    assert len(files) > 2
    return [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if re.search(r"\bERROR\b|Traceback", line)]


def reasons_to_leave(logs: Path) -> set[str]:
    """Why the hosts that Serve stopped went when they did."""
    return {reason for file in logs.glob("worker-*.err") for reason in re.findall(r" host INFO leaving after .*?: (.*)", file.read_text())}


def test_nodes_come_with_the_load_and_go_with_it(tmp_path, record_property):
    with AutoscalingRay(NODE_TYPES, IDLE_TIMEOUT_S) as ray:
        shoal = Deployment(ray, write_tiny("v2-lite", tmp_path / "v2-lite"))
        shoal.deploy()
        with grpc.insecure_channel(shoal.app.grpc) as channel:
            # All of this process's calls share one connection, and while no node is there it ends at the head's proxy: on one machine
            # the proxies share their port, and in a cluster no client's connection ends at an expert's node.
            grpc.channel_ready_future(channel).result(timeout=WAIT_S)
            assert not shoal.num_nodes()
            start_s = shoal.wait_for(lambda: shoal.application()["status"] == "RUNNING")
            assert shoal.num_nodes() == {"routers": 1, "experts": 1}
            shoal.assert_all_on_their_own_node_types()
            stub = cluster_pb2_grpc.ClusterStub(channel)

            def hosts() -> list[cluster_pb2.HostLoad]:
                return list(stub.GetLoad(cluster_pb2.GetLoadRequest(), timeout=30, metadata=shoal.app.metadata).hosts)

            def four_hosts_serve() -> bool:
                return [bool(host.published and host.stats.get("num_frames")) for host in hosts()] == [True] * 4

            answers = ask_all(shoal.app, PROMPTS, NUM_TOKENS)
            with Load(shoal.app, answers, num_clients=1, num_tokens=NUM_TOKENS, pause_s=0.5) as steady:
                with Load(shoal.app, answers, num_clients=8, num_tokens=NUM_TOKENS) as load:
                    node_s = shoal.wait_for(lambda: shoal.num_nodes()["experts"] == 2)
                    fill_s = node_s + shoal.wait_for(four_hosts_serve)
                    shoal.assert_all_on_their_own_node_types()
                fewer_s = shoal.wait_for(lambda: len(hosts()) == 2)
                gone_s = fewer_s + shoal.wait_for(lambda: shoal.num_nodes()["experts"] == 1)
                num_before = steady.num_answers
                shoal.wait_for(lambda: steady.num_answers > num_before + 1)
            assert all(host.published for host in hosts())
        assert not load.problems
        assert not steady.problems
        assert shoal.num_nodes() == {"routers": 1, "experts": 1}
        shoal.assert_all_on_their_own_node_types()
        assert complaints(ray.logs) == []
        assert reasons_to_leave(ray.logs) == {"no map in use names this host"}
        figures = (
            f"serving, from no node, {start_s:.1f} s; one more node {node_s:.1f} s and its hosts in use {fill_s:.1f} s after the load's "
            f"step; two hosts gone {fewer_s:.1f} s and a node {gone_s:.1f} s after its end"
        )
        print(figures, f"({load.num_answers} + {steady.num_answers} answers)")
        record_property("node_scaling", figures)
