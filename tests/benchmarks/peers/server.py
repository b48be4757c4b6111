"""A side's server process: started, waited for, and ended with all that it started."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.environments import ROOT, PeerFailed, inherited, tail

STOP_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens and the model's name there."""

    host: str
    port: int
    model: str

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = ASK_TIMEOUT_S) -> Any:
        """The JSON that answers. Raises PeerFailed."""
        url = f"http://{self.host}:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise PeerFailed(f"{url} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from error
        except (OSError, ValueError) as error:
            raise PeerFailed(f"{url} does not answer: {error}") from error


@contextmanager
def serving(
    command: Sequence[str], environment: dict[str, str], endpoint: Endpoint, health: str, log: Path, timeout_s: float
) -> Iterator[Endpoint]:
    """Up once `health` answers. Raises PeerFailed with the log's last lines if the process ends or is not up within `timeout_s`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        env = {**inherited(), **environment}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True)
    try:
        _await_health(process, endpoint, health, log, timeout_s)
        try:
            yield endpoint
        except PeerFailed as error:
            raise PeerFailed(f"{error}\nthe last lines of {log}:\n{tail(log)}") from error
    finally:
        _stop(process)


def _await_health(process: subprocess.Popen[bytes], endpoint: Endpoint, health: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerFailed(f"the server ended ({process.returncode}) before it was up; the last lines of {log}:\n{tail(log)}")
        try:
            endpoint.ask(health, timeout_s=5.0)
        except PeerFailed:
            time.sleep(0.25)
            continue
        return
    raise PeerFailed(f"the server was not up within {timeout_s:.0f} s; the last lines of {log}:\n{tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C would; then the process group, which is its own, with what may be left of it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)
