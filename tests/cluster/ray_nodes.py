"""Ray nodes as pods are: each a `ray start --block` with ports and a directory of its own, ended by pid, whole or process by process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.free_ports import free_port
from tests.haproxy import haproxy_environment

START_TIMEOUT_S = 60.0
REPOSITORY = Path(__file__).parents[2]
# As in a pod of KubeRay's with GCS fault tolerance: a node outlives its head by minutes.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "600", "RAY_worker_niceness": "0"}


@dataclass(frozen=True)
class Node:
    """`process` is its `ray start`; `token` is in the environment of everything below it."""

    process: "subprocess.Popen[bytes]"
    token: str
    log: Path

    def pids(self) -> list[int]:
        """Of all its live processes."""
        return [pid for pid in _all_pids() if _has_token(pid, self.token)]

    def titles(self) -> list[str]:
        """What its processes are called: their programs, or `ray::` and what they run."""
        return [arguments[0] for arguments in map(_arguments, self.pids()) if arguments]

    def kill(self) -> None:
        """SIGKILL for every process, `ray start` itself first, so that it tidies nothing up."""
        self.process.kill()
        wait_until(lambda: not self._strike(), "the node's processes do not die")
        self.process.wait()

    def _strike(self) -> list[int]:
        pids = self.pids()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return pids

    def raylet_id(self) -> str:
        """Its Ray node id, as its raylet was told it."""
        for pid in self.pids():
            arguments = _arguments(pid)
            if arguments and Path(arguments[0]).name == "raylet":
                return next(word.removeprefix("--node_id=") for word in arguments if word.startswith("--node_id="))
        raise AssertionError("it has no raylet")


class RayNodes:
    """Context manager: a head at `address` and any number of other nodes; everything is gone at the end.

    With `haproxy` Serve's ingress is HAProxy, as in the manifests.
    """

    def __init__(self, ip: str, *, haproxy: bool = False) -> None:
        self.ip = ip
        self.port = free_port()
        self.address = f"{ip}:{self.port}"
        self._environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        self._haproxy = haproxy
        self._directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the paths of Unix sockets must be short
        self._nodes: list[Node] = []
        self._seen: set[str] = set()

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for node in reversed(self._nodes):
            node.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start_head(self, flags: Sequence[str] = (), **environment: str) -> Node:
        """Without CPUs, at the same address every time. Returns when its raylet has joined."""
        ports = [f"--port={self.port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        node = self._start(["--head", *ports, *flags], self.ip, 0, {}, (), environment)
        wait_until(self._listens, f"no head at {self.address}")
        wait_until(lambda: self._ids_of_alive() - self._seen != set(), "the head has no raylet")
        self._seen |= self._ids_of_alive()
        return node

    def start_worker(self, num_cpus: float, resources: Mapping[str, float], ip: str | None = None, prefix: Sequence[str] = ()) -> Node:
        """Returns when the head knows it."""
        node = self._start([f"--address={self.address}"], ip or self.ip, num_cpus, resources, prefix, {})
        wait_until(lambda: self._ids_of_alive() - self._seen != set(), "the node did not join")
        self._seen |= self._ids_of_alive()
        return node

    def num_alive(self) -> int:
        """Nodes that the head counts as alive."""
        return len(self._ids_of_alive())

    def _ids_of_alive(self) -> set[str]:
        """Asked without a driver, which would end with its node."""
        nodes = GcsClient(address=self.address).get_all_node_info(timeout=5, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
        return {node.hex() for node in nodes}

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.ip, self.port), 1).close()
        except OSError:
            return False
        return True

    def run(self, command: Sequence[str], timeout_s: float) -> str:
        """Its standard output; an exit status other than 0 is an error that shows all it said."""
        done = subprocess.run(command, env=self._environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(
        self,
        flags: Sequence[str],
        ip: str,
        num_cpus: float,
        resources: Mapping[str, float],
        prefix: Sequence[str],
        environment: Mapping[str, str],
    ) -> Node:
        token = uuid.uuid4().hex
        directory = self._directory / str(len(self._nodes))
        directory.mkdir()
        log = directory / "start.log"
        command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *flags]
        command += [f"--node-ip-address={ip}", f"--num-cpus={num_cpus:g}", f"--resources={json.dumps(dict(resources))}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--temp-dir={directory}", "--object-store-memory=100000000"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **self._environment,
                    **(haproxy_environment(directory) if self._haproxy else {}),
                    **environment,
                    "SHOAL_TEST_NODE": token,
                },
            )
        node = Node(process, token, log)
        self._nodes.append(node)
        return node


def wait_until(what: Callable[[], bool], message: str, timeout_s: float = START_TIMEOUT_S, interval_s: float = 0.1) -> float:
    """The seconds that it took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < timeout_s, message
        time.sleep(interval_s)
    return time.monotonic() - started


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _has_token(pid: int, token: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and token.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
