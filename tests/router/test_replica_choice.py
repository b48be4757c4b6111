"""Which replicas: only those that hold the expert, every token once, and near the best that any split could do."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.grouping import NOBODY, NOT_WANTED
from router.replica_choice import Costs, HostCost, Replicas, hosts_of_choices, prepare, share_tokens
from tests.reference.replica_choice import busiest, level_limit, lowest_busiest


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    prepare()


def shares_of(counts, hosts, queued, costs) -> list[list[int]]:
    """Tokens for each host of each expert."""
    replicas = Replicas.of(hosts)
    shares = share_tokens(np.array(counts, dtype=np.int64), replicas, np.array(queued, dtype=np.float64), Costs.of(costs)).tolist()
    return [shares[first:last] for first, last in pairwise(replicas.starts.tolist())]


@st.composite
def batches(draw, max_hosts: int, max_experts: int, max_tokens: int):
    num_hosts, num_experts = draw(st.integers(1, max_hosts)), draw(st.integers(1, max_experts))
    held = st.lists(st.integers(0, num_hosts - 1), unique=True, max_size=num_hosts)
    counts = draw(st.lists(st.integers(0, max_tokens), min_size=num_experts, max_size=num_experts))
    return counts, draw(st.lists(held, min_size=num_experts, max_size=num_experts)), num_hosts


host_costs = st.builds(HostCost, st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from([0.1, 0.3, 1.0]))


@given(batches(max_hosts=3, max_experts=4, max_tokens=5), st.data())
def test_the_busiest_host_is_within_one_activation_and_two_tokens_of_the_best_split(batch, data: st.DataObject):
    counts, hosts, num_hosts = batch
    queued = data.draw(st.lists(st.integers(0, 4), min_size=num_hosts, max_size=num_hosts))
    costs = data.draw(st.lists(host_costs, min_size=num_hosts, max_size=num_hosts))
    shares = shares_of(counts, hosts, queued, costs)
    for count, held, tokens in zip(counts, hosts, shares, strict=True):
        assert sum(tokens) == (count if held else 0)
        assert min(tokens, default=0) >= 0
    allowed = max(cost.per_expert for cost in costs) + 2 * max(cost.per_token for cost in costs)
    assert busiest(shares, hosts, queued, costs) <= lowest_busiest(counts, hosts, queued, costs) + allowed + 1e-9


@given(batches(max_hosts=6, max_experts=40, max_tokens=200))
def test_tokens_alone_are_level_but_for_one_a_host(batch):
    counts, hosts, num_hosts = batch
    costs = [HostCost(0.0, 1.0)] * num_hosts
    shares = shares_of(counts, hosts, [0] * num_hosts, costs)
    assert busiest(shares, hosts, [0] * num_hosts, costs) <= level_limit(counts, hosts, num_hosts) + num_hosts + 1


@given(batches(max_hosts=6, max_experts=40, max_tokens=200), host_costs)
def test_never_worse_than_tokens_spread_level(batch, cost: HostCost):
    counts, hosts, num_hosts = batch
    queued, costs = [0] * num_hosts, [cost] * num_hosts
    level = shares_of(counts, hosts, queued, [cost._replace(per_expert=0.0)] * num_hosts)
    chosen = shares_of(counts, hosts, queued, costs)
    assert busiest(chosen, hosts, queued, costs) <= busiest(level, hosts, queued, costs) + 1e-6


@given(batches(max_hosts=5, max_experts=9, max_tokens=0), st.integers(0, 40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_each_choice_goes_to_a_holder_and_each_replica_gets_its_share(batch, num_tokens: int, top_k: int, rng):
    _, hosts, num_hosts = batch
    ids = np.array([[rng.randint(-1, len(hosts) - 1) for _ in range(top_k)] for _ in range(num_tokens)], dtype=np.int16)
    ids = ids.reshape(num_tokens, top_k)
    counts = [int((ids == expert).sum()) for expert in range(len(hosts))]
    replicas = Replicas.of(hosts)
    shares = share_tokens(np.array(counts), replicas, np.zeros(num_hosts), Costs.of([HostCost(0.0, 1.0)] * num_hosts))
    chosen = hosts_of_choices(ids, shares, replicas, num_hosts, NOBODY, NOT_WANTED)
    assert chosen.shape == ids.shape
    assert (chosen[ids < 0] == NOT_WANTED).all()
    for expert, held in enumerate(hosts):
        mine = chosen[ids == expert].tolist()
        assert all(host in held if held else host == NOBODY for host in mine)
        first = replicas.starts[expert]
        assert [mine.count(host) for host in held] == shares[first : first + len(held)].tolist()


def test_a_token_goes_where_it_goes_anyway():
    """Expert 0 is split over two hosts; the tokens that have expert 1 (host 0) and those that have expert 2 (host 1) stay together."""
    replicas = Replicas.of([[0, 1], [0], [1]])
    ids = np.array([[0, 2], [0, 1], [0, 1], [0, 2]], dtype=np.int16)
    shares = share_tokens(np.array([4, 2, 2]), replicas, np.zeros(2), Costs.of([HostCost(0.0, 1.0)] * 2))
    assert shares.tolist() == [2, 2, 2, 2]
    assert hosts_of_choices(ids, shares, replicas, 2, NOBODY, NOT_WANTED).tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]


def test_queues_and_costs_count():
    assert shares_of([1], [[0, 1]], [100, 0], [HostCost(), HostCost()]) == [[0, 1]]
    assert shares_of([1], [[0, 1]], [0, 0], [HostCost(2.0, 0.1), HostCost(1.0, 0.1)]) == [[0, 1]]
    assert shares_of([5, 5], [[0, 1], [0, 1]], [0, 0], [HostCost()] * 2) == [[5, 0], [0, 5]]
    assert shares_of([9, 5], [[0], [0, 1]], [0, 0], [HostCost()] * 2) == [[9], [0, 5]]


def test_an_expert_is_split_only_where_that_relieves_the_busiest_host():
    assert shares_of([10, 100], [[0, 1], [1]], [0, 0], [HostCost()] * 2) == [[10, 0], [100]]
    assert shares_of([100], [[0, 1]], [0, 0], [HostCost()] * 2) == [[50, 50]]
    assert sorted(shares_of([8], [[0, 1]], [0, 0], [HostCost(3.0, 0.0)] * 2)[0]) == [0, 8]


def test_two_steps_where_one_does_not_help():
    """Host 0 can only be relieved by way of host 1, which must first hand something on to host 2."""
    hosts = [[0], [0, 1], [1, 2], [2]]
    assert shares_of([10, 10, 10, 1], hosts, [0, 0, 0], [HostCost(1.0, 0.04)] * 3)[1:3] == [[0, 10], [0, 10]]


def test_experts_without_tokens_cost_nothing():
    assert shares_of([0, 0, 1], [[1], [1], [0, 1]], [0, 1], [HostCost()] * 2) == [[0], [0], [1, 0]]
