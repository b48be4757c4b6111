"""What every replica that computes does once at its start: log lines, threads, and who and where it is."""

import os
import random

import ray
import torch
from ray import serve

from actors.log_lines import configure_logging as configure_logging  # for every replica but the torch-free one
from router.placement_map import HostKey


def use_threads(threads: int | None, sharers: int = 1) -> int:
    """Sets torch's threads: as configured, else this node's cores over the processes that compute at once. Returns the number."""
    cores = len(os.sched_getaffinity(0))
    number = threads or max(1, cores // max(1, sharers))
    torch.set_num_threads(number)
    return number


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
