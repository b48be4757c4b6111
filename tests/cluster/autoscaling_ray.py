"""A Ray with its own autoscaler (version 2) and its fake node provider: a head that has no work, and nodes that come when asked for.

Every process of it carries one token in its environment, by which the last of them are found and ended.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.util import get_node_ip_address

from tests.free_ports import free_port

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
TOKEN = "SHOAL_TEST_AUTOSCALING"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # what the fake provider calls the head
TYPE_LABEL = "node-type"
OBJECT_STORE_BYTES = 80_000_000
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind, as a worker group of a RayCluster: `resources` of one node, whole numbers."""

    resources: Mapping[str, int]
    min_workers: int
    max_workers: int


class AutoscalingRay:
    """Context manager; `dashboard` is its HTTP address, as the KubeRay operator uses it, `logs` the folder of its logs."""

    def __init__(self, node_types: Mapping[str, NodeType], idle_timeout_s: float) -> None:
        self._token = uuid.uuid4().hex
        self._directory = Path(tempfile.mkdtemp(prefix="shoal-ray-"))  # short: Unix sockets lie below it
        self._port = free_port()
        dashboard_port = free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        self.logs = self._directory / "session_latest" / "logs"
        self._config = self._directory / "autoscaling.json"
        self._config.write_text(json.dumps(_autoscaling_config(node_types, idle_timeout_s, f"{get_node_ip_address()}:{self._port}")))
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        self._command += [f"--port={self._port}", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={free_port()}"]
        self._command += [f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        self._command += [f"--temp-dir={self._directory}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        self._command += ["--num-cpus=0", f"--autoscaling-config={self._config}"]
        self._head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "AutoscalingRay":
        with (self._directory / "head.log").open("wb") as log:
            self._head = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=REPOSITORY, env=self._environment()
            )
        try:
            self._wait(self._answers, START_TIMEOUT_S, "the dashboard of Ray's head does not answer")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def nodes(self) -> dict[str, str]:
        """Types of the worker nodes that live, by node id (hexadecimal)."""
        answer = httpx.get(f"{self.dashboard}/api/v0/nodes", params={"detail": True}, timeout=30).raise_for_status().json()
        rows = answer["data"]["result"]["result"]
        return {row["node_id"]: row["labels"][TYPE_LABEL] for row in rows if row["state"] == "ALIVE" and not row["is_head_node"]}

    def processes(self) -> list[psutil.Process]:
        """Live ones that carry the token."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN) == self._token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _environment(self) -> dict[str, str]:
        own = {
            TOKEN: self._token,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "DASHBOARD_METRIC_PORT": str(free_port()),
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2",
        }
        return {**os.environ, **own}

    def _answers(self) -> bool:
        assert self._head is not None
        assert self._head.poll() is None, (self._directory / "head.log").read_text()
        try:
            return httpx.get(f"{self.dashboard}/api/version", timeout=5).is_success
        except httpx.TransportError:
            return False

    def _wait(self, what: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        until = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < until, complaint
            time.sleep(0.2)

    def _stop(self) -> None:
        """By their pids, all at once: a head that is asked to end takes its time, and what the autoscaler started outlives it."""
        assert self._head is not None
        until = time.monotonic() + STOP_TIMEOUT_S
        while left := self.processes():
            assert time.monotonic() < until, left
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)
        self._head.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _autoscaling_config(node_types: Mapping[str, NodeType], idle_timeout_s: float, gcs_address: str) -> dict[str, Any]:
    """The provider is named by its class: Ray's own name for it reads defaults from a file that its wheel lacks."""
    types: dict[str, Any] = {
        name: {
            "resources": {**kind.resources, "object_store_memory": OBJECT_STORE_BYTES},
            "labels": {TYPE_LABEL: name},
            "node_config": {},
            "min_workers": kind.min_workers,
            "max_workers": kind.max_workers,
        }
        for name, kind in node_types.items()
    }
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind.max_workers for kind in node_types.values()),
        "idle_timeout_minutes": idle_timeout_s / 60,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "cluster_synced_files": [],
        "available_node_types": types,
        "head_node_type": "ray.head.default",
    }
