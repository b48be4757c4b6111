"""A Ray of two nodes in two network namespaces, joined by one link that can be cut. Needs root."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.free_ports import free_port

START_TIMEOUT_S = 60.0
OPEN_RAY = {"RAY_AUTH_MODE": "disabled"}  # for every process that is to join it


class TwoNodes:
    """One side here, the other in a namespace of its own, `name`; `address` is what `shoal serve --address` takes."""

    def __init__(self, name: str, near_ip: str, far_ip: str) -> None:
        self.name = name
        self.near_ip = near_ip
        self.far_ip = far_ip
        self.address = ""

    @property
    def far_prefix(self) -> list[str]:
        """Before a command that is to run on the far side."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """The link as it was."""
        _ip("link", "set", self._link, "up")

    @property
    def _link(self) -> str:
        return f"{self.name}n"


@contextmanager
def two_sides() -> Iterator[TwoNodes]:
    """A second network namespace and the link to it, without any process; both gone at the end."""
    number = os.getpid() % 250
    sides = TwoNodes(f"sh{uuid.uuid4().hex[:6]}", f"10.213.{number}.1", f"10.213.{number}.2")
    name = sides.name
    try:
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}n", "type", "veth", "peer", "name", f"{name}f")
        _ip("link", "set", f"{name}f", "netns", name)
        _ip("addr", "add", f"{sides.near_ip}/30", "dev", f"{name}n")
        _ip("link", "set", f"{name}n", "up")
        _ip("-n", name, "addr", "add", f"{sides.far_ip}/30", "dev", f"{name}f")
        for device in (f"{name}f", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        yield sides
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", f"{name}n")
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)


@contextmanager
def two_nodes(near: dict[str, float], far: dict[str, float]) -> Iterator[TwoNodes]:
    """Both nodes up, with these resources; everything gone at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    with two_sides() as nodes:
        try:
            port = free_port()
            nodes.address = f"{nodes.near_ip}:{port}"
            processes.append(
                _start_ray([], ["--head", f"--port={port}", f"--node-ip-address={nodes.near_ip}", "--include-dashboard=false"], near)
            )
            _wait_for_port(nodes.near_ip, port)
            processes.append(_start_ray(nodes.far_prefix, [f"--address={nodes.address}", f"--node-ip-address={nodes.far_ip}"], far))
            _wait_for_nodes(nodes.address, 2)
            yield nodes
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _start_ray(prefix: list[str], flags: list[str], resources: dict[str, float]) -> "subprocess.Popen[bytes]":
    num_cpus = resources.get("CPU", 0)
    custom = {name: amount for name, amount in resources.items() if name != "CPU"}
    command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *flags]
    # Fixed by default, and another Ray of this machine may have them.
    command += [f"--dashboard-agent-listen-port={free_port()}", *([f"--ray-client-server-port={free_port()}"] if "--head" in flags else [])]
    command += [f"--num-cpus={num_cpus:g}", f"--resources={json.dumps(custom)}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **OPEN_RAY}
    )


def _wait_for_port(host: str, port: int) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, port), 1).close()
        except OSError:
            assert time.monotonic() < until, f"nothing listens at {host}:{port}"
            time.sleep(0.2)
        else:
            return


def _wait_for_nodes(address: str, number: int) -> None:
    """In a process of its own: this one may be a driver of another Ray."""
    program = (
        "import ray, time\n"
        f"ray.init({address!r}, log_to_driver=False)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {number}: time.sleep(0.2)\n"
    )
    environment = {**os.environ, **OPEN_RAY}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=START_TIMEOUT_S, env=environment)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
