"""Starts the hosts of these tests as processes of their own, and ends them."""

import contextlib
import json
import select
import subprocess
import sys
import time
from pathlib import Path

from router.placement_map import Endpoint

ROOT = Path(__file__).parents[3]


def start(*arguments):
    """The interpreter with these arguments, in pipes."""
    return subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)


@contextlib.contextmanager
def echo_host(secret="secret", application="app", node_id="node-1"):
    """Yields (process, endpoint)."""
    process = start("-m", "tests.router.transport.echo_host", secret, application, node_id)
    try:
        yield process, Endpoint(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def receive(channel, timeout_s=30.0):
    """The next answer, waited for as a dispatcher does: readable, or a heartbeat's time."""
    deadline = time.monotonic() + timeout_s
    while (answer := channel.receive()) is None:
        assert time.monotonic() < deadline, "no answer in time"
        select.select([channel], [], [], 0.5)
    return answer
