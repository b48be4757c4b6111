"""The first half of a plan: keep what may stay, give every expert its replicas, and fill up with copies of the hot ones.

Compiled. Numba reads the functions' own types; what they take is described in placement_arrays.
"""

from typing import Any, NamedTuple

import numpy as np

from cluster.placement_arrays import Bools, Fleet, Floats, Ints, Model, Reasons, Wanted
from router.compiled import compiled

# Why a replica is loaded: its value in `why` [N, H].
TOO_FEW, OTHER_NODE, SPARE, BALANCE = 1, 2, 3, 4


class _State(NamedTuple):
    """What follows from `holds`; `times` [L, H] are loads split evenly over replicas, divided by the host's speed."""

    holds: Bools
    origin: Bools  # as `holds` was: going back there loads nothing
    why: Reasons
    replicas: Ints
    of_layer: Ints
    used_slots: Ints
    used_bytes: Ints
    times: Floats


@compiled
def repair(model: Model, fleet: Fleet, wanted: Wanted, holds: Bools, why: Reasons) -> None:
    """Changes `holds` as little as the promises allow; notes in `why` the reason of each replica that is new.

    Copies beyond the layer's number go, and what is too many on a host: those with most replicas elsewhere first. Too few
    replicas: on a node without one, then within the host's quota, then where the layer's load is lowest. Up to the layer's number,
    the expert with most load per replica gets one more, as in DeepSeek's EPLB.
    """
    num_layers, num_hosts = wanted.quotas.shape
    num_experts, num_nodes = len(holds), fleet.nodes.max() + 1
    state = _State(
        holds,
        holds.copy(),
        why,
        np.zeros(num_experts, dtype=np.int64),
        np.zeros((num_layers, num_hosts), dtype=np.int64),
        np.zeros(num_hosts, dtype=np.int64),
        np.zeros(num_hosts, dtype=np.int64),
        np.zeros((num_layers, num_hosts)),
    )
    for expert in range(num_experts):
        for host in range(num_hosts):
            if holds[expert, host]:
                holds[expert, host] = False
                _set(expert, host, True, model, fleet, state)
    for host in range(num_hosts):  # first of all, for what they hold is no replica elsewhere
        if fleet.slots[host] == 0:
            _shed(host, model, fleet, state)
    for layer in range(num_layers):
        _trim(layer, model, fleet, wanted, state)
    for host in range(num_hosts):
        _shed(host, model, fleet, state)
    for layer in range(num_layers):
        is_empty = True
        for expert in range(model.starts[layer], model.starts[layer + 1]):
            is_empty = is_empty and state.replicas[expert] == 0
        if is_empty:
            _pack(layer, model, fleet, wanted, state)
    for num_replicas in range(1, wanted.min_replicas + 1):
        for expert in model.order:
            if state.replicas[expert] < num_replicas:
                _replicate(expert, num_replicas, model, fleet, wanted, state)
            elif 1 < num_replicas <= num_nodes:
                _spread(expert, num_replicas, model, fleet, wanted, state)
    for layer in range(num_layers):
        _trim(layer, model, fleet, wanted, state)
    for layer in range(num_layers):
        _fill(layer, model, fleet, wanted, state)


@compiled
def _set(expert: int, host: int, held: bool, model: Model, fleet: Fleet, state: _State) -> None:
    """Adds or drops one replica; the others' share of its load changes with it."""
    layer, before, sign = model.layers[expert], state.replicas[expert], 1 if held else -1
    old = model.weights[expert] / before if before else 0.0
    new = model.weights[expert] / (before + sign) if before + sign else 0.0
    for other in range(len(fleet.slots)):
        if other != host and state.holds[expert, other]:
            state.times[layer, other] += (new - old) / fleet.speeds[other]
    state.times[layer, host] += (new if held else -old) / fleet.speeds[host]
    state.holds[expert, host] = held
    state.replicas[expert] += sign
    state.of_layer[layer, host] += sign
    state.used_slots[host] += sign
    state.used_bytes[host] += sign * model.sizes[expert]


@compiled
def _shed(host: int, model: Model, fleet: Fleet, state: _State) -> None:
    """Makes the host fit: experts with most replicas go first, then those with least load."""
    while state.used_slots[host] > fleet.slots[host] or state.used_bytes[host] > fleet.bytes[host]:
        dropped = -1
        for expert in range(len(state.holds)):
            if state.holds[expert, host] and (
                dropped < 0
                or state.replicas[expert] > state.replicas[dropped]
                or (state.replicas[expert] == state.replicas[dropped] and model.weights[expert] < model.weights[dropped])
            ):
                dropped = expert
        if dropped < 0:
            return
        _set(dropped, host, False, model, fleet, state)


@compiled
def _replicas_by_node(expert: int, fleet: Fleet, state: _State) -> Any:
    """[H]: how many replicas each node has; nodes are numbered below H."""
    num = np.zeros(len(fleet.slots), dtype=np.int64)
    for host in range(len(fleet.slots)):
        if state.holds[expert, host]:
            num[fleet.nodes[host]] += 1
    return num


@compiled
def _best_host(expert: int, is_spare: bool, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> int:
    """Where one more replica goes, or -1: to a new node and back to where it was unless it is a spare, within the quota, and then
    where there is least time, fewest of the layer, fewest in all.
    """
    layer = model.layers[expert]
    size, share = model.sizes[expert], model.weights[expert] / (state.replicas[expert] + 1)
    on_node = _replicas_by_node(expert, fleet, state)
    best, best_rank, best_time = -1, 0, 0.0
    for host in range(len(fleet.slots)):
        if state.holds[expert, host] or state.used_slots[host] >= fleet.slots[host]:
            continue
        if state.used_bytes[host] + size > fleet.bytes[host]:
            continue
        rank = 1 if state.of_layer[layer, host] >= wanted.quotas[layer, host] else 0
        if not is_spare:
            rank += (4 if on_node[fleet.nodes[host]] > 0 else 0) + (0 if state.origin[expert, host] else 2)
        time = state.times[layer, host] + share / fleet.speeds[host]
        if best >= 0:
            if rank != best_rank:
                is_better = rank < best_rank
            elif abs(time - best_time) > 1e-9 * best_time:
                is_better = time < best_time
            elif state.of_layer[layer, host] != state.of_layer[layer, best]:
                is_better = state.of_layer[layer, host] < state.of_layer[layer, best]
            else:
                is_better = state.used_slots[host] < state.used_slots[best]
            if not is_better:
                continue
        best, best_rank, best_time = host, rank, time
    return best


@compiled
def _pack(layer: int, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> None:
    """A layer that nobody holds: replicas for the hot first, then all by load per replica, most first."""
    first, last = model.starts[layer], model.starts[layer + 1]
    num_hosts = (fleet.slots > 0).sum()
    counts = np.full(last - first, wanted.min_replicas, dtype=np.int64)
    per_replica = model.weights[first:last] / wanted.min_replicas
    for _ in range(wanted.replicas[layer] - counts.sum()):
        hottest, most = -1, 0.0
        for expert in range(last - first):
            if counts[expert] < num_hosts and per_replica[expert] > most:
                hottest, most = expert, per_replica[expert]
        if hottest < 0:
            break
        counts[hottest] += 1
        per_replica[hottest] = model.weights[first + hottest] / counts[hottest]
    for _ in range(last - first):
        expert = int(np.argmax(per_replica))
        per_replica[expert] = -1.0
        for num in range(counts[expert]):
            host = _best_host(first + expert, num >= wanted.min_replicas, model, fleet, wanted, state)
            if host >= 0:
                _set(first + expert, host, True, model, fleet, state)
                state.why[first + expert, host] = TOO_FEW if num < wanted.min_replicas else SPARE


@compiled
def _replicate(expert: int, num_replicas: int, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> None:
    """One more replica, whatever has to make room."""
    host = _best_host(expert, False, model, fleet, wanted, state)
    if host < 0:
        host = _evict(expert, 1 if num_replicas == 1 else wanted.min_replicas, model, fleet, state)
    if host < 0:
        host = _make_room(expert, model, fleet, state)
    if host >= 0:
        _set(expert, host, True, model, fleet, state)
        state.why[expert, host] = TOO_FEW


@compiled
def _spread(expert: int, num_replicas: int, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> None:
    """One of two replicas on the same node goes to a node that has none, where there is room."""
    on_node = _replicas_by_node(expert, fleet, state)
    num_nodes, layer, doubled = 0, model.layers[expert], -1
    for host in range(len(fleet.slots)):
        num_nodes += 1 if on_node[host] > 0 else 0
        if not state.holds[expert, host] or on_node[fleet.nodes[host]] < 2:
            continue
        if doubled < 0 or state.times[layer, host] > state.times[layer, doubled]:
            doubled = host
    if num_nodes >= num_replicas or doubled < 0:
        return
    host = _best_host(expert, False, model, fleet, wanted, state)
    if host >= 0 and on_node[fleet.nodes[host]] == 0:
        _set(expert, host, True, model, fleet, state)
        _set(expert, doubled, False, model, fleet, state)
        state.why[expert, host] = OTHER_NODE


@compiled
def _evict(expert: int, min_replicas: int, model: Model, fleet: Fleet, state: _State) -> int:
    """Drops another expert's spare copy from a host without this one; the host, or -1. The layer's own copies first."""
    layer = model.layers[expert]
    for is_whole in range(2):
        first = 0 if is_whole else model.starts[layer]
        last = len(state.holds) if is_whole else model.starts[layer + 1]
        victim, victim_host, least = -1, -1, np.inf
        for other in range(first, last):
            if state.replicas[other] <= min_replicas or model.weights[other] / state.replicas[other] >= least:
                continue
            for host in range(len(fleet.slots)):
                fits = state.used_bytes[host] - model.sizes[other] + model.sizes[expert] <= fleet.bytes[host]
                if fits and state.holds[other, host] and not state.holds[expert, host]:
                    victim, victim_host, least = other, host, model.weights[other] / state.replicas[other]
        if victim >= 0:
            _set(victim, victim_host, False, model, fleet, state)
            return victim_host
    return -1


@compiled
def _make_room(expert: int, model: Model, fleet: Fleet, state: _State) -> int:
    """Moves other experts along a chain of hosts, the last of which has a free slot; the host that then has one, or -1.

    Needed where the only free slots are on hosts that hold the expert already: an augmenting path, found breadth first.
    """
    num_hosts = len(fleet.slots)
    came_from = np.full(num_hosts, -2, dtype=np.int64)
    carried = np.full(num_hosts, -1, dtype=np.int64)
    queue = np.empty(num_hosts, dtype=np.int64)
    head = tail = 0
    for host in range(num_hosts):
        if not state.holds[expert, host] and fleet.slots[host] > 0:
            came_from[host] = -1
            queue[tail] = host
            tail += 1
    while head < tail:
        source = queue[head]
        head += 1
        for target in range(num_hosts):
            if came_from[target] != -2 or fleet.slots[target] <= 0:
                continue
            for other in range(len(state.holds)):
                if state.holds[other, source] and not state.holds[other, target]:
                    came_from[target], carried[target] = source, other
                    queue[tail] = target
                    tail += 1
                    break
            fits = state.used_bytes[target] + model.sizes[carried[target]] <= fleet.bytes[target]
            if came_from[target] != -2 and state.used_slots[target] < fleet.slots[target] and fits:
                last = target
                while came_from[last] >= 0:
                    _set(carried[last], last, True, model, fleet, state)
                    _set(carried[last], came_from[last], False, model, fleet, state)
                    state.why[carried[last], last] = TOO_FEW
                    last = came_from[last]
                return last if state.used_bytes[last] + model.sizes[expert] <= fleet.bytes[last] else -1
    return -1


@compiled
def _trim(layer: int, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> None:
    """Drops copies beyond the layer's number: of the expert with least load per replica left, on its busiest host."""
    first, last = model.starts[layer], model.starts[layer + 1]
    surplus = -wanted.replicas[layer]
    for expert in range(first, last):
        surplus += max(state.replicas[expert], wanted.min_replicas)
    for _ in range(surplus):
        victim, least = -1, np.inf
        for expert in range(first, last):
            num = state.replicas[expert]
            if num > wanted.min_replicas and model.weights[expert] / (num - 1) < least:
                victim, least = expert, model.weights[expert] / (num - 1)
        if victim < 0:
            return
        on_node = _replicas_by_node(victim, fleet, state)
        worst, worst_rank = -1, 0
        for host in range(len(fleet.slots)):
            if state.holds[victim, host]:
                is_over = state.used_slots[host] > fleet.slots[host] or state.used_bytes[host] > fleet.bytes[host]
                rank = min(on_node[fleet.nodes[host]], 2) + (2 if is_over else 0)
                if worst < 0 or rank > worst_rank or (rank == worst_rank and state.times[layer, host] > state.times[layer, worst]):
                    worst, worst_rank = host, rank
        _set(victim, worst, False, model, fleet, state)


@compiled
def _fill(layer: int, model: Model, fleet: Fleet, wanted: Wanted, state: _State) -> None:
    """Copies the hottest experts up to the layer's number, within the hosts' quotas."""
    first, last = model.starts[layer], model.starts[layer + 1]
    per_replica = model.weights[first:last] / np.maximum(state.replicas[first:last], 1)
    lacking = wanted.replicas[layer] - state.replicas[first:last].sum()
    while lacking > 0:
        expert = first + int(np.argmax(per_replica))
        if per_replica[expert - first] < 0:
            return
        host = _best_host(expert, True, model, fleet, wanted, state)
        if host < 0 or state.of_layer[layer, host] >= wanted.quotas[layer, host]:
            per_replica[expert - first] = -1.0  # no host is left that could take one
            continue
        _set(expert, host, True, model, fleet, state)
        state.why[expert, host] = SPARE
        per_replica[expert - first] = model.weights[expert] / state.replicas[expert]
        lacking -= 1
