"""`shoal serve` as a user starts it: a process of its own, watched by its output, ended by a signal."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.free_ports import free_port

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


class ServeProcess:
    """Context manager; `http` and `grpc` are the addresses of the ready line, `name` the model id.

    `shoal` is the command, by default this interpreter's, and `environment` what it is started with instead of ours.
    """

    def __init__(
        self, model_dir: Path, *flags: str, shoal: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.lines: list[str] = []
        self._arrived: queue.Queue[str | None] = queue.Queue()
        self._token = uuid.uuid4().hex  # every process below inherits it, whatever session or parent it moves to
        ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
        self.process = subprocess.Popen(
            [*(shoal or (sys.executable, "-m", "cluster.cli")), "serve", str(model_dir), *ports, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "SHOAL_TEST_TOKEN": self._token},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "ServeProcess":
        try:
            ready = self.wait_for(r"^shoal ready  model (\S+)  http (\S+)  grpc (\S+)", START_TIMEOUT_S)
        except BaseException:
            self.stop(signal.SIGINT)
            raise
        self.name, self.http, self.grpc = ready.groups()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGINT)

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first line from now on that matches; the process's end or the time-out is an error that shows its output."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            try:
                line = self._arrived.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                break
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line matching {pattern!r}; it printed:\n" + "\n".join(self.lines))

    def descendants(self) -> dict[int, str]:
        """Live processes that this serve started, by pid, with their command lines (Ray renames its actors)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if self._token.encode() in environment and state != "Z" and int(entry.name) != self.process.pid:
                found[int(entry.name)] = command
        return found

    def stop(self, number: int) -> int:
        """Sends the signal and waits for the end; SIGKILL only after a time-out, and then it is an error."""
        self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("did not stop in time; it printed:\n" + "\n".join(self.lines)) from None
        finally:
            self._reader.join(5.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)
        self.process.stdout.close()
