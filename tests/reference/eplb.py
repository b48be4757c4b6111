"""What DeepSeek's published expert-parallel load balancer does with one group: replicate, then pack, written from its description."""

import numpy as np


def eplb(loads: np.ndarray, num_slots: int, num_hosts: int) -> list[list[int]]:
    """The experts of each host, from loads [E]; every host gets num_slots / num_hosts.

    The expert with most load per replica gets one more, until the slots are used; then replicas go, most load first, each to
    the least loaded host that has a slot. Two replicas of one expert may meet on a host, but not where another host has room.
    """
    replicas = np.ones(len(loads), dtype=int)
    for _ in range(num_slots - len(loads)):
        replicas[np.argmax(np.where(replicas < num_hosts, loads / replicas, -1))] += 1
    physical = np.repeat(np.arange(len(loads)), replicas)
    weights = (loads / replicas)[physical]
    held: list[list[int]] = [[] for _ in range(num_hosts)]
    host_loads = np.zeros(num_hosts)
    for index in np.argsort(-weights, kind="stable"):
        free = [host for host in range(num_hosts) if len(held[host]) < num_slots // num_hosts]
        host = min([host for host in free if physical[index] not in held[host]] or free, key=lambda host: host_loads[host])
        held[host].append(int(physical[index]))
        host_loads[host] += weights[index]
    return held
