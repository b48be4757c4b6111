"""What every replica that computes does once at its start: log lines, threads, and who and where it is."""

import os
import random
from math import ceil
from pathlib import Path

import ray
import torch
from ray import serve

from actors.log_lines import configure_logging as configure_logging  # for every replica but the torch-free one
from router.placement_map import HostKey

CGROUP = Path("/sys/fs/cgroup")


def use_threads(threads: int | None, sharers: int = 1, *, has_crew: bool) -> int:
    """How many threads to compute with: as configured, else this node's cores over the processes that compute at once.

    Sets torch's too; to one where the crew of `model.cpu_threads` does what is large: torch's others stay awake for a while after their
    work, on cores that the crew's need.
    """
    number = threads or max(1, num_cores() // max(1, sharers))
    torch.set_num_threads(1 if has_crew else number)
    return number


def num_cores(cgroup: Path = CGROUP) -> int:
    """Those that this process may run on; in a container with a CPU limit no more than the limit, rounded up.

    More threads than the limit would use up its share of a period at once and stand still for the rest of it.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return cores if quota is None else min(cores, max(1, ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """CPUs of the container's limit, by the kernel's cgroup v2 or v1 files; None without a limit."""
    try:
        words = (cgroup / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(cgroup / "cpu" / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        except OSError:
            return None
    has_limit = len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0
    return int(words[0]) / int(words[1]) if has_limit else None


def this_replica() -> HostKey:
    """The Serve id of this replica, with an incarnation that no other life of it has."""
    context = serve.get_replica_context()
    return HostKey(context.replica_id.unique_id, random.getrandbits(62))


def node_id() -> str:
    """Ray's id of this node: the same id means that shared memory joins two processes."""
    return str(ray.get_runtime_context().get_node_id())


def node_ip() -> str:
    """The address at which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())
