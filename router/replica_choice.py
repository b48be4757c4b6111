"""Which replicas a batch's tokens go to: decided per batch, from its own counts and the hosts' queues.

A layer's E experts have R replicas in all, listed expert by expert: those of expert e lie from starts[e] to starts[e + 1] of
`holders` [R], which are host indices. Compiled: Numba reads the functions' own types.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from router import grouping
from router.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Steps of the search, at most, for each host.
STEPS_PER_HOST = 8
MAX_ROUNDS = 40


class HostCost(NamedTuple):
    """What a batch costs a host: `per_expert` (alpha) for each activated expert, `per_token` (beta) for each token; one unit for both.

    The default is the ratio of a float32 expert on a CPU, where a small batch is bound by reading weights.
    """

    per_expert: float = 1.0
    per_token: float = 0.04


class Replicas(NamedTuple):
    """starts [E + 1] and holders [R]."""

    starts: Ints
    holders: Ints

    @classmethod
    def of(cls, hosts: Sequence[Sequence[int]]) -> Self:
        """From the host indices of each expert."""
        starts = np.zeros(len(hosts) + 1, dtype=np.int64)
        starts[1:] = np.cumsum([len(held) for held in hosts])
        return cls(starts, np.array([host for held in hosts for host in held], dtype=np.int64))


class Costs(NamedTuple):
    """HostCost of each of H hosts, as columns [H]."""

    per_expert: Floats
    per_token: Floats

    @classmethod
    def of(cls, costs: Sequence[HostCost]) -> Self:
        """In the order of the hosts' indices."""
        per_expert, per_token = [cost.per_expert for cost in costs], [cost.per_token for cost in costs]
        return cls(np.array(per_expert, dtype=np.float64), np.array(per_token, dtype=np.float64))


class _Batch(NamedTuple):
    """A choice in the making: which experts have one, the tokens that each replica gets [R], and what each host costs so far [H]."""

    free: Ints
    shares: Ints
    loads: Floats


@compiled
def share_tokens(counts: Ints, replicas: Replicas, queued: Floats, costs: Costs) -> Ints:
    """Tokens for each replica, [R], from tokens for each expert, `counts` [E]; `queued` [H] tokens are on their way to a host.

    Keeps max over hosts of (alpha x activated experts + beta x tokens) low, by local search from two starts: whole experts, each
    where its host ends up least loaded, most tokens first; and tokens spread level, whatever that activates (water-filling: what
    alpha 0 gives). The better one is taken, so it is never worse than water-filling.
    """
    whole: _Batch = _place_whole(counts, replicas, queued, costs)
    if len(whole.free) == 0:
        return whole.shares
    _relieve(whole, replicas, costs)
    tokens_only = Costs(np.zeros_like(costs.per_expert), costs.per_token)
    level: _Batch = _place_whole(counts, replicas, queued, tokens_only)
    _relieve(level, replicas, tokens_only)
    _count(level, replicas, queued, costs)
    _relieve(level, replicas, costs)
    best = level if level.loads.max() < whole.loads.max() else whole
    return best.shares


@compiled
def hosts_of_choices(expert_ids: NDArray[np.int16], shares: Ints, replicas: Replicas, num_hosts: int, nobody: int, not_wanted: int) -> Ints:
    """The host of each choice [T, K], so that each replica gets its share of the tokens.

    A token's experts go to a host that it goes to anyway, as far as the shares allow: its hidden state is sent to a host once.
    `nobody` for an expert without replicas, `not_wanted` for the id -1.
    """
    starts, holders = replicas
    only = np.full(len(starts), nobody, dtype=np.int64)  # the host of an expert that has one here; the id -1 finds the last
    only[-1] = not_wanted
    split = np.zeros(len(starts), dtype=np.bool_)
    for expert in range(len(starts) - 1):
        for place in range(starts[expert], starts[expert + 1]):
            if shares[place] > 0:
                split[expert] = only[expert] != nobody
                only[expert] = holders[place]
    left = shares.copy()
    hosts = np.empty(expert_ids.shape, dtype=np.int64)
    goes_to = np.zeros(num_hosts, dtype=np.int64)  # the last token, counted from 1, that goes to a host
    for token in range(expert_ids.shape[0]):
        for choice in range(expert_ids.shape[1]):
            host = hosts[token, choice] = only[expert_ids[token, choice]]
            if host >= 0 and not split[expert_ids[token, choice]]:
                goes_to[host] = token + 1
        for choice in range(expert_ids.shape[1]):
            expert = expert_ids[token, choice]
            if split[expert]:
                best, best_left = -1, 0
                for place in range(starts[expert], starts[expert + 1]):
                    weight = left[place] + (1 << 40 if goes_to[holders[place]] == token + 1 else 0)
                    if left[place] > 0 and weight > best_left:
                        best, best_left = place, weight
                left[best] -= 1
                hosts[token, choice] = holders[best]
                goes_to[holders[best]] = token + 1
    return hosts


@compiled
def _place_whole(counts: Ints, replicas: Replicas, queued: Floats, costs: Costs) -> _Batch:
    """Each expert on one of its hosts: those without a choice, then the others, most tokens first."""
    starts, holders = replicas
    shares = np.zeros(len(holders), dtype=np.int64)
    loads = queued * costs.per_token
    free = np.empty(len(counts), dtype=np.int64)
    num_free = 0
    for expert in range(len(counts)):
        place = starts[expert]
        num_holders = starts[expert + 1] - place
        if counts[expert] and num_holders == 1:
            shares[place] = counts[expert]
            loads[holders[place]] += costs.per_expert[holders[place]] + costs.per_token[holders[place]] * counts[expert]
        elif counts[expert] and num_holders > 1:
            position = num_free
            while position > 0 and counts[free[position - 1]] < counts[expert]:
                free[position] = free[position - 1]
                position -= 1
            free[position] = expert
            num_free += 1
    for expert in free[:num_free]:
        best, best_after = -1, np.inf
        for place in range(starts[expert], starts[expert + 1]):
            host = holders[place]
            after = loads[host] + costs.per_expert[host] + costs.per_token[host] * counts[expert]
            if after < best_after:
                best, best_after = place, after
        shares[best] = counts[expert]
        loads[holders[best]] = best_after
    return _Batch(free[:num_free], shares, loads)


@compiled
def _count(batch: _Batch, replicas: Replicas, queued: Floats, costs: Costs) -> None:
    batch.loads[:] = queued * costs.per_token
    for place in range(len(replicas.holders)):
        if batch.shares[place] > 0:
            host = replicas.holders[place]
            batch.loads[host] += costs.per_expert[host] + costs.per_token[host] * batch.shares[place]


@compiled
def _shift(source: int, target: int, tokens: int, batch: _Batch, replicas: Replicas, costs: Costs) -> None:
    """Moves tokens of one expert between two of its replicas."""
    from_host, to_host = replicas.holders[source], replicas.holders[target]
    if batch.shares[target] == 0:
        batch.loads[to_host] += costs.per_expert[to_host]
    batch.shares[source] -= tokens
    batch.shares[target] += tokens
    batch.loads[from_host] -= costs.per_token[from_host] * tokens
    batch.loads[to_host] += costs.per_token[to_host] * tokens
    if batch.shares[source] == 0:
        batch.loads[from_host] -= costs.per_expert[from_host]


@compiled
def _level(batch: _Batch, replicas: Replicas, costs: Costs) -> None:
    """Moves tokens between hosts that have their expert activated, or need pay nothing for it, until no pair gains."""
    starts, holders = replicas
    for _ in range(MAX_ROUNDS):
        has_moved = False
        for expert in batch.free:
            for source in range(starts[expert], starts[expert + 1]):
                for target in range(starts[expert], starts[expert + 1]):
                    from_host, to_host = holders[source], holders[target]
                    gap = batch.loads[from_host] - batch.loads[to_host]
                    if batch.shares[source] == 0 or gap <= 0 or (batch.shares[target] == 0 and costs.per_expert[to_host] > 0):
                        continue
                    pace = costs.per_token[from_host] + costs.per_token[to_host]
                    tokens = min(int(gap / pace), batch.shares[source]) if pace > 0 else 0
                    if tokens > 0:
                        _shift(source, target, tokens, batch, replicas, costs)
                        has_moved = True
        if not has_moved:
            return


@compiled
def _best_step(host: int, besides: int, batch: _Batch, replicas: Replicas, costs: Costs) -> Any:
    """(source, target, tokens, peak): what takes most off a host, and the higher of the two hosts' costs after it.

    All of an expert's tokens there, or as many as make the two hosts equal. `besides` is an expert that stays.
    """
    starts, holders = replicas
    best = (-1, -1, 0, np.inf)
    for expert in batch.free:
        if expert == besides:
            continue
        for source in range(starts[expert], starts[expert + 1]):
            held = batch.shares[source]
            if holders[source] != host or held == 0:
                continue
            for target in range(starts[expert], starts[expert + 1]):
                if target == source:
                    continue
                other = holders[target]
                start = batch.loads[other] + (costs.per_expert[other] if batch.shares[target] == 0 else 0.0)
                emptied = batch.loads[host] - costs.per_expert[host] - costs.per_token[host] * held
                peak = max(emptied, start + costs.per_token[other] * held)
                if peak < best[3]:
                    best = (source, target, held, peak)
                pace = costs.per_token[host] + costs.per_token[other]
                tokens = min(int((batch.loads[host] - start) / pace), held - 1) if pace > 0 else 0
                if tokens > 0:
                    peak = max(batch.loads[host] - costs.per_token[host] * tokens, start + costs.per_token[other] * tokens)
                    if peak < best[3]:
                        best = (source, target, tokens, peak)
    return best


@compiled
def _relieve(batch: _Batch, replicas: Replicas, costs: Costs) -> None:
    """Takes load off the busiest host, in one step or in two through another host, until neither helps."""
    starts, holders = replicas
    for _ in range(STEPS_PER_HOST * len(batch.loads)):
        _level(batch, replicas, costs)
        busiest = int(np.argmax(batch.loads))
        limit = batch.loads[busiest] * (1 - 1e-9)
        source, target, tokens, peak = _best_step(busiest, -1, batch, replicas, costs)
        if peak < limit:
            _shift(source, target, tokens, batch, replicas, costs)
            continue
        lowest = limit
        first, second = (-1, -1, 0), (-1, -1, 0)
        for expert in batch.free:
            for source in range(starts[expert], starts[expert + 1]):
                tokens = batch.shares[source]
                if holders[source] != busiest or tokens == 0:
                    continue
                for target in range(starts[expert], starts[expert + 1]):
                    if target == source:
                        continue
                    before_source, before_target = batch.loads[busiest], batch.loads[holders[target]]
                    _shift(source, target, tokens, batch, replicas, costs)
                    then = _best_step(holders[target], expert, batch, replicas, costs)
                    after = then[3] if then[0] >= 0 and holders[then[1]] == busiest else max(then[3], batch.loads[busiest])
                    if after < lowest:
                        lowest, first, second = after, (source, target, tokens), then[:3]
                    batch.shares[source] = tokens
                    batch.shares[target] -= tokens
                    batch.loads[busiest], batch.loads[holders[target]] = before_source, before_target
        if lowest >= limit:
            return
        _shift(first[0], first[1], first[2], batch, replicas, costs)
        _shift(second[0], second[1], second[2], batch, replicas, costs)


@functools.cache
def prepare() -> None:
    """Compiles for this process, seconds the first time on a machine and milliseconds after, so that no request waits for it."""
    replicas, costs = Replicas.of([[0, 1]]), Costs.of([HostCost()] * 2)
    shares = share_tokens(np.ones(1, dtype=np.int64), replicas, np.zeros(2), costs)
    hosts_of_choices(np.zeros((1, 1), dtype=np.int16), shares, replicas, 2, -1, -2)
    grouping.prepare()
