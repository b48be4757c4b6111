"""Which replica of an expert a batch goes to: decided per batch, from its own counts and the hosts' queues."""

from collections.abc import Sequence
from typing import NamedTuple

from router.parts import NOBODY


class HostCost(NamedTuple):
    """What a batch costs a host: `per_expert` (alpha) for each activated expert, `per_token` (beta) for each token; one unit for both.

    The default is the ratio of a float32 expert on a CPU, where a small batch is bound by reading weights.
    """

    per_expert: float = 1.0
    per_token: float = 0.04


def choose_replicas(
    counts: Sequence[int],
    replicas: Sequence[Sequence[int]],
    queued: Sequence[int],
    costs: Sequence[HostCost],
) -> list[int]:
    """The host of each of E experts, as an index; NOBODY where there is no replica.

    Keeps max over hosts of (alpha x activated experts + beta x tokens) low, greedily: the experts without a choice are given,
    then the others, most tokens first, each go where the host ends up least loaded. `counts` [E] are the batch's tokens per
    expert, `replicas` [E] the hosts that hold it, `queued` [hosts] the tokens already on their way to a host.
    """
    chosen = [hosts[0] if hosts else NOBODY for hosts in replicas]
    loads = [cost.per_token * tokens for cost, tokens in zip(costs, queued, strict=True)]
    free = []
    for expert, count in enumerate(counts):
        if count and len(replicas[expert]) > 1:
            free.append(expert)
        elif count and replicas[expert]:
            loads[chosen[expert]] += costs[chosen[expert]].per_expert + costs[chosen[expert]].per_token * count
    for expert in sorted(free, key=lambda expert: -counts[expert]):
        after = {host: loads[host] + costs[host].per_expert + costs[host].per_token * counts[expert] for host in replicas[expert]}
        best = min(after, key=lambda host: (after[host], host))
        chosen[expert] = best
        loads[best] = after[best]
    return chosen
