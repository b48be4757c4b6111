"""`shoal serve` as a subprocess of a benchmark: up, its address, and down again."""

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.free_ports import free_port
from tests.haproxy import haproxy_environment

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def shoal_serving(directory: Path, *flags: str, haproxy: bool = True) -> Iterator[str]:
    """The HTTP address of `shoal serve DIRECTORY *flags` on free ports. RuntimeError with what it said if it is not ready in time.

    Its ingress is HAProxy, as in the manifests, or Serve's Python proxy, as without them.
    """
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "serve",
        str(directory),
        "--http-port",
        str(free_port()),
        "--grpc-port",
        str(free_port()),
        *flags,
    ]
    with tempfile.TemporaryDirectory(prefix="haproxy", dir="/tmp", ignore_cleanup_errors=True) as files:
        environment = os.environ | (haproxy_environment(Path(files)) | _of_one_node() if haproxy else {})
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


def _of_one_node() -> dict[str, str]:
    """Gateways that stop would wait 30 s for others to take them off a list; the proxy behind HAProxy would take fixed ports."""
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


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
