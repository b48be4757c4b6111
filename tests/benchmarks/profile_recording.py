"""Samples of running processes over one window of time: their stacks by py-spy, and each thread's time on a core by the kernel."""

import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.benchmarks.flame_graph import Stack, parse_stacks

RATE = 50  # samples a second of each process: more, or with the process stopped for each, doubles a step
START_S = 1.0  # py-spy's, about, until it samples
END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ThreadTime:
    """Seconds on a core, and seconds in which it could have run and no core was free."""

    on_core_s: float = 0.0
    wants_core_s: float = 0.0

    def __add__(self, other: "ThreadTime") -> "ThreadTime":
        return ThreadTime(self.on_core_s + other.on_core_s, self.wants_core_s + other.wants_core_s)

    def __sub__(self, other: "ThreadTime") -> "ThreadTime":
        return ThreadTime(self.on_core_s - other.on_core_s, self.wants_core_s - other.wants_core_s)


@dataclass
class Recording:
    """What one process did: samples by stack, times by thread id, over `wall_s` seconds in all."""

    stacks: dict[Stack, int] = field(default_factory=dict)
    threads: dict[int, ThreadTime] = field(default_factory=dict)
    wall_s: float = 0.0

    def add(self, stacks: Mapping[Stack, int], threads: Mapping[int, ThreadTime], wall_s: float) -> None:
        """One more window."""
        for stack, samples in stacks.items():
            self.stacks[stack] = self.stacks.get(stack, 0) + samples
        for thread, times in threads.items():
            self.threads[thread] = self.threads.get(thread, ThreadTime()) + times
        self.wall_s += wall_s


def thread_times(pid: int) -> dict[int, ThreadTime]:
    """Of every thread since its start, by the scheduler's own count; threads that end meanwhile are left out."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            on_core_ns, wants_core_ns, _ = (task / "schedstat").read_text().split()
        except OSError:
            continue
        found[int(task.name)] = ThreadTime(int(on_core_ns) / 1e9, int(wants_core_ns) / 1e9)
    return found


def core_seconds(root: psutil.Process) -> dict[int, tuple[str, float]]:
    """Of `root` and all below it: process title, and seconds of a core since its start."""
    found = {}
    for process in (root, *root.children(recursive=True)):
        try:
            times, title = process.cpu_times(), " ".join(process.cmdline()) or process.name()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = (title, times.user + times.system)
    return found


def machine_seconds() -> tuple[float, float]:
    """Core seconds since the machine's start: of all its processes, and taken by whoever shares its processors."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.steal - times.guest - times.guest_nice, times.steal


def record(recordings: Mapping[int, Recording], seconds: int) -> None:
    """Adds a window of that many seconds to the recording of each process id. RuntimeError with what py-spy said if it cannot."""
    command = [f"{sysconfig.get_path('scripts')}/py-spy", "record", "--rate", str(RATE), "--duration", str(seconds)]
    command += ["--nonblocking", "--idle", "--threads", "--format", "raw"]
    with tempfile.TemporaryDirectory() as directory:
        files = {pid: Path(directory) / str(pid) for pid in recordings}
        before, started = {pid: thread_times(pid) for pid in recordings}, time.perf_counter()
        spies = {
            pid: subprocess.Popen(
                [*command, "--pid", str(pid), "--output", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for pid, file in files.items()
        }
        said: dict[int, str] = {}
        try:
            for pid, spy in spies.items():
                said[pid] = spy.communicate(timeout=seconds + END_TIMEOUT_S)[0]
        finally:
            for spy in spies.values():
                if spy.poll() is None:
                    spy.kill()
                    spy.wait()
        wall_s = time.perf_counter() - started
        for pid, spy in spies.items():
            if spy.returncode or not files[pid].exists():
                raise RuntimeError(f"py-spy could not record process {pid}; it needs ptrace and the same user. It said: {said[pid]}")
            times = {thread: now - before[pid].get(thread, ThreadTime()) for thread, now in thread_times(pid).items()}
            # Times are of the whole call, samples of its `seconds`: told in samples' time.
            scale = seconds / wall_s
            scaled = {thread: ThreadTime(t.on_core_s * scale, t.wants_core_s * scale) for thread, t in times.items()}
            recordings[pid].add(parse_stacks(files[pid].read_text()), scaled, float(seconds))
