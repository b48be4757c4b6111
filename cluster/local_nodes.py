"""Ray's processes on this machine or in this container, as /proc shows them: which nodes are here, and what Serve runs on them."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROXIES = ("ray::ProxyActor", "ray::HAProxyManager")
REPLICA = "ray::ServeReplica:"
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Process:
    """`arguments` as it was started, or the one title that it has given itself since."""

    pid: int
    parent: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class LocalNode:
    """A Ray node whose raylet runs here. `ip` is what others call it by, `gcs_address` where its head is."""

    node_id: str
    ip: str
    gcs_address: str
    raylet_pid: int
    is_head: bool


def read_processes(directory: Path = Path("/proc")) -> list[Process]:
    """All that we may look at; those that end meanwhile are left out."""
    found = []
    for entry in directory.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                parent = int((entry / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
                found.append(Process(int(entry.name), parent, tuple(word.strip() for word in title.split("\0") if word.strip())))
    return found


def nodes_of(processes: Iterable[Process]) -> list[LocalNode]:
    """One for each raylet."""
    found = []
    for process in processes:
        if process.arguments and Path(process.arguments[0]).name == "raylet":
            flags = dict(word.removeprefix("--").split("=", 1) for word in process.arguments[1:] if word.startswith("--") and "=" in word)
            if "node_id" in flags:
                node_id, address = flags["node_id"], flags.get("gcs-address", "")
                is_head = HEAD in flags.get("static_resource_list", "")
                found.append(LocalNode(node_id, flags.get("node_ip_address", ""), address, process.pid, is_head))
    return found


def served_on(node: LocalNode, processes: Iterable[Process]) -> Counter[str]:
    """How many of what Serve runs on that node: replicas by deployment ("ExpertHost": 2), and "proxy"."""
    names: Counter[str] = Counter()
    for process in processes:
        if process.parent == node.raylet_pid and process.arguments:
            title = process.arguments[0]
            if title.startswith(REPLICA):
                # Until its first call an actor's title ends in its class, afterwards in the method that it runs.
                names[title.removeprefix(REPLICA).split(":")[1].split(".")[0]] += 1
            elif title.startswith(PROXIES):
                names["proxy"] += 1
    return names
