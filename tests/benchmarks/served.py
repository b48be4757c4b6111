"""`shoal serve` as a subprocess of a benchmark: up, its address, and down again."""

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.haproxy import haproxy_environment

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
# Gateways that stop would wait 30 s for others to take them off a list.
_OF_ONE_NODE = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}


@contextmanager
def shoal_serving(directory: Path, *flags: str, haproxy: bool = True) -> Iterator[str]:
    """The HTTP address of `shoal serve DIRECTORY *flags` on free ports. RuntimeError with what it said if it is not ready in time.

    Its ingress is HAProxy, as in the manifests, or Serve's Python proxy, as without them.
    """
    ports = _free_ports(2)
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "serve",
        str(directory),
        "--http-port",
        str(ports[0]),
        "--grpc-port",
        str(ports[1]),
        *flags,
    ]
    with tempfile.TemporaryDirectory(prefix="haproxy", dir="/tmp", ignore_cleanup_errors=True) as files:
        environment = os.environ | (haproxy_environment(Path(files)) | _OF_ONE_NODE | _fallback_ports() if haproxy else {})
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            yield _address(process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _fallback_ports() -> dict[str, str]:
    """Of the Python proxy that Serve keeps behind HAProxy: fixed ones, unless it is told."""
    names = ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT")
    return {name: str(port) for name, port in zip(names, _free_ports(2), strict=True)}


def _address(process: subprocess.Popen[bytes]) -> str:
    """Reads what the process prints up to its ready line; a thread-free loop, so that a hang cannot outlive the deadline."""
    assert process.stdout is not None
    said = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if not selector.select(timeout=1.0):
                continue
            chunk = process.stdout.read1(65536)  # type: ignore[attr-defined]
            said += chunk
            ready = re.search(rb"^shoal ready.*\bhttp (\S+).*\n", said, re.MULTILINE)
            if ready:
                return ready[1].decode()
            if not chunk:
                break
    raise RuntimeError(f"shoal serve was not ready within {START_TIMEOUT_S:.0f} s; it said:\n{said.decode(errors='replace')}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
