"""The processes and the placement of a running application, as a test looks at them from outside."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster.conftest import App


def pids_of(app: App, role: str) -> list[int]:
    """The processes of one role ("Router", "ExpertHost", ...), oldest first."""
    wanted = f"ServeReplica:{app.name}:{role}"
    return sorted(pid for pid, command in _commands() if wanted in command)


def replicas_of_experts(view: dict[str, Any]) -> Counter[int]:
    """How many experts of the published map have how many hosts."""
    return Counter(len(hosts) for layer in view["placement"]["layers"].values() for hosts in layer.values())


def is_whole(app: App, num_hosts: int, min_replicas: int) -> bool:
    """Whether so many hosts live, each publishes experts, and every expert has its replicas."""
    view = app.view()
    published = [host for host in view["hosts"] if host["published"]]
    return len(view["hosts"]) == len(published) == num_hosts and min(replicas_of_experts(view), default=0) >= min_replicas


def _commands() -> Iterator[tuple[int, str]]:
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with suppress(OSError):
                yield int(directory.name), (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
