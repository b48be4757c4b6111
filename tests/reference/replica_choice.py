"""Replica choice by trying every way to split every expert's tokens over its hosts, and the limit that no split can pass."""

import itertools

from router.replica_choice import HostCost


def busiest(shares_of_experts, hosts_of_experts, queued, costs) -> float:
    """The highest cost of any host; shares and hosts by expert."""
    loads = [cost.per_token * tokens for cost, tokens in zip(costs, queued, strict=True)]
    for shares, hosts in zip(shares_of_experts, hosts_of_experts, strict=True):
        for tokens, host in zip(shares, hosts, strict=True):
            loads[host] += costs[host].per_expert * (tokens > 0) + costs[host].per_token * tokens
    return max(loads)


def lowest_busiest(counts, hosts_of_experts, queued, costs: list[HostCost]) -> float:
    """The least that the busiest host can cost."""
    splits = [list(_splits(count, len(hosts))) if hosts else [()] for count, hosts in zip(counts, hosts_of_experts, strict=True)]
    return min(busiest(shares, hosts_of_experts, queued, costs) for shares in itertools.product(*splits))


def level_limit(counts, hosts_of_experts, num_hosts: int) -> float:
    """Tokens of the busiest host if tokens could be cut: the fullest set of hosts by what only they can take (Hall's condition)."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(num_hosts), size) for size in range(1, num_hosts + 1))
    return max(
        sum(count for count, hosts in zip(counts, hosts_of_experts, strict=True) if hosts and set(hosts) <= set(some)) / len(some)
        for some in sets
    )


def _splits(tokens: int, places: int):
    if places == 1:
        yield (tokens,)
        return
    for first in range(tokens + 1):
        for rest in _splits(tokens - first, places - 1):
            yield (first, *rest)
