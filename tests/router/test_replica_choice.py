"""Which replica: always one that holds the expert, and near the best that any choice could do."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.parts import NOBODY
from router.replica_choice import HostCost, choose_replicas


def busiest(counts, chosen, queued, costs) -> float:
    loads = [cost.per_token * tokens for cost, tokens in zip(costs, queued, strict=True)]
    for count, host in zip(counts, chosen, strict=True):
        if count and host != NOBODY:
            loads[host] += costs[host].per_expert + costs[host].per_token * count
    return max(loads)


@given(st.data())
def test_the_busiest_host_is_at_most_twice_the_best_choice_s(data: st.DataObject):
    """Greedy list scheduling on equal machines stays under twice the optimum (Graham 1966)."""
    num_hosts, num_experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    hosts = list(range(num_hosts))
    counts = data.draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    replicas = [hosts if data.draw(st.booleans()) else [] for _ in range(num_experts)]
    costs, queued = [HostCost()] * num_hosts, [0] * num_hosts
    chosen = choose_replicas(counts, replicas, queued, costs)
    assert all(host in held if held else host == NOBODY for host, held in zip(chosen, replicas, strict=True))
    best = min(busiest(counts, choice, queued, costs) for choice in itertools.product(*(held or [NOBODY] for held in replicas)))
    assert busiest(counts, chosen, queued, costs) <= 2 * best + 1e-9


def test_queues_and_costs_count():
    assert choose_replicas([1], [[0, 1]], [100, 0], [HostCost(), HostCost()]) == [1]
    assert choose_replicas([1], [[0, 1]], [0, 0], [HostCost(2.0, 0.1), HostCost(1.0, 0.1)]) == [1]
    assert choose_replicas([5, 5], [[0, 1], [0, 1]], [0, 0], [HostCost()] * 2) == [0, 1]
    assert choose_replicas([9, 5], [[0], [0, 1]], [0, 0], [HostCost()] * 2) == [0, 1]


def test_experts_without_tokens_cost_nothing():
    assert choose_replicas([0, 0, 3], [[1], [1], [0, 1]], [0, 1], [HostCost()] * 2) == [1, 1, 0]
