"""The second half of a plan: the few changes to a layer's placement that gain more balance than their bytes cost.

Compiled. Numba reads the functions' own types; what they take is described in placement_arrays. Of a layer's E experts, each
replica carries a share of the load: part of it fixed, the rest wherever its other hosts are busier, as replica choice has it.
"""

from typing import NamedTuple

import numpy as np

from cluster.placement_arrays import Bools, Fleet, Floats, Ints, Model, Reasons, Wanted
from cluster.placement_repair import BALANCE
from router.compiled import compiled

# This part of an expert's load is planned as split evenly over its replicas; replica choice puts the rest where there is room.
# Real batches differ from the mean they are planned for, and the even part is the slack that they need.
EVEN_PART = 0.5
# What a step must take off the busiest host, as a part of the mean host load.
SMALLEST_STEP = 2e-3
# Steps look at so many of the least busy hosts.
NUM_TARGETS = 6


class Price(NamedTuple):
    """What a layer's new placement must gain in balancedness: its floor of `floors` [L], and `per_layer` x (bytes to load / bytes of
    the layer's replicas).
    """

    per_layer: float
    floors: Floats


class _Layer(NamedTuple):
    """E experts, H hosts; experts are numbered within the layer."""

    weights: Floats  # [E]
    sizes: Ints  # [E]
    origin: Bools  # [E, H]: loaded already
    holds: Bools  # [E, H]
    held: Ints  # [H, E]: a host's experts are its first num_held
    num_held: Ints  # [H]
    holders: Ints  # [E, H]: an expert's hosts are its first `replicas`
    replicas: Ints  # [E]
    shares: Floats  # [E, H]
    times: Floats  # [H]: shares over speed
    quotas: Ints  # [H]
    used_slots: Ints  # [H], over all layers
    used_bytes: Ints  # [H], over all layers
    new_bytes: Ints  # [1]: to load for what was opened, less what was closed again


class _Step(NamedTuple):
    """`expert` goes from `source` to `target` (or is copied there) in exchange for `other` (or in place of that spare copy)."""

    expert: int
    source: int
    target: int
    other: int
    copies: bool


@compiled
def balance(
    model: Model, fleet: Fleet, wanted: Wanted, holds: Bools, origin: Bools, why: Reasons, has_load: Bools, price: Price, even_part: float
) -> None:
    """Changes `holds` where that pays, in the layers that have load; a replica of `origin` is loaded already."""
    num_hosts = len(fleet.slots)
    used_slots, used_bytes = np.zeros(num_hosts, dtype=np.int64), np.zeros(num_hosts, dtype=np.int64)
    total_speed = 0.0
    for host in range(num_hosts):
        total_speed += fleet.speeds[host] if fleet.slots[host] > 0 else 0.0
        for expert in range(len(holds)):
            if holds[expert, host]:
                used_slots[host] += 1
                used_bytes[host] += model.sizes[expert]
    for index in range(len(has_load)):
        if has_load[index]:
            first, last = model.starts[index], model.starts[index + 1]
            layer = _layer(first, last, model, fleet, holds, origin, wanted.quotas[index], used_slots, used_bytes)
            fair = layer.weights.sum() / total_speed
            _level(layer, fleet.speeds, even_part, fair)
            best = _improve(layer, fleet, wanted.min_replicas, price.per_layer, price.floors[index], even_part, fair)
            for expert in range(last - first):
                for host in range(num_hosts):
                    if best[expert, host] and not layer.holds[expert, host]:
                        _open(expert, host, layer)
                    elif layer.holds[expert, host] and not best[expert, host]:
                        _close(expert, host, layer, fleet.speeds)
                    if best[expert, host] and not holds[first + expert, host]:
                        why[first + expert, host] = BALANCE
                    holds[first + expert, host] = best[expert, host]


@compiled
def balancedness(model: Model, fleet: Fleet, holds: Bools, even_part: float) -> Floats:
    """[L]: the time a layer would take if all hosts shared its load by speed, over the busiest host's; 1 without any holder."""
    num_layers, num_hosts = len(model.starts) - 1, len(fleet.slots)
    values = np.ones(num_layers)
    nothing = np.zeros(num_hosts, dtype=np.int64)
    for index in range(num_layers):
        layer = _layer(model.starts[index], model.starts[index + 1], model, fleet, holds, holds, nothing, nothing.copy(), nothing.copy())
        load = layer.shares.sum()
        if load > 0:
            fair = load / fleet.speeds.sum()
            _level(layer, fleet.speeds, even_part, fair)
            values[index] = fair / layer.times.max()
    return values


@compiled
def _layer(
    first: int,
    last: int,
    model: Model,
    fleet: Fleet,
    holds: Bools,
    origin: Bools,
    quotas: Ints,
    used_slots: Ints,
    used_bytes: Ints,
) -> _Layer:
    """The layer as `holds` has it, loads split evenly."""
    num_experts, num_hosts = last - first, len(fleet.slots)
    layer = _Layer(
        model.weights[first:last],
        model.sizes[first:last],
        origin[first:last],
        holds[first:last].copy(),
        np.empty((num_hosts, num_experts + 1), dtype=np.int64),
        np.zeros(num_hosts, dtype=np.int64),
        np.empty((num_experts, num_hosts + 1), dtype=np.int64),
        np.zeros(num_experts, dtype=np.int64),
        np.zeros((num_experts, num_hosts)),
        np.zeros(num_hosts),
        quotas,
        used_slots,
        used_bytes,
        np.zeros(1, dtype=np.int64),
    )
    for expert in range(num_experts):
        for host in range(num_hosts):
            if layer.holds[expert, host]:
                layer.held[host, layer.num_held[host]] = expert
                layer.num_held[host] += 1
                layer.holders[expert, layer.replicas[expert]] = host
                layer.replicas[expert] += 1
        _split_evenly(expert, layer, fleet.speeds)
    return layer


@compiled
def _open(expert: int, host: int, layer: _Layer) -> None:
    layer.holds[expert, host] = True
    layer.held[host, layer.num_held[host]] = expert
    layer.num_held[host] += 1
    layer.holders[expert, layer.replicas[expert]] = host
    layer.replicas[expert] += 1
    layer.used_slots[host] += 1
    layer.used_bytes[host] += layer.sizes[expert]
    layer.new_bytes[0] += 0 if layer.origin[expert, host] else layer.sizes[expert]


@compiled
def _close(expert: int, host: int, layer: _Layer, speeds: Floats) -> None:
    layer.holds[expert, host] = False
    layer.num_held[host] -= 1
    for place in range(layer.num_held[host]):
        if layer.held[host, place] == expert:
            layer.held[host, place] = layer.held[host, layer.num_held[host]]
            break
    layer.replicas[expert] -= 1
    for place in range(layer.replicas[expert]):
        if layer.holders[expert, place] == host:
            layer.holders[expert, place] = layer.holders[expert, layer.replicas[expert]]
            break
    layer.times[host] -= layer.shares[expert, host] / speeds[host]
    layer.shares[expert, host] = 0.0
    layer.used_slots[host] -= 1
    layer.used_bytes[host] -= layer.sizes[expert]
    layer.new_bytes[0] -= 0 if layer.origin[expert, host] else layer.sizes[expert]


@compiled
def _split_evenly(expert: int, layer: _Layer, speeds: Floats) -> None:
    even = layer.weights[expert] / max(layer.replicas[expert], 1)
    for place in range(layer.replicas[expert]):
        host = layer.holders[expert, place]
        layer.times[host] += (even - layer.shares[expert, host]) / speeds[host]
        layer.shares[expert, host] = even


@compiled
def _level(layer: _Layer, speeds: Floats, even_part: float, fair: float) -> None:
    """Moves each expert's free load from its busiest host to its quickest, round after round, until little moves."""
    for _ in range(20):
        most = 0.0
        for expert in range(len(layer.weights)):
            if layer.replicas[expert] < 2:
                continue
            least = even_part * layer.weights[expert] / layer.replicas[expert]
            slow, quick = -1, -1
            for place in range(layer.replicas[expert]):
                host = layer.holders[expert, place]
                if layer.shares[expert, host] > least * (1 + 1e-9) and (slow < 0 or layer.times[host] > layer.times[slow]):
                    slow = host
                if quick < 0 or layer.times[host] < layer.times[quick]:
                    quick = host
            if slow < 0 or layer.times[slow] <= layer.times[quick]:
                continue
            load = (layer.times[slow] - layer.times[quick]) / (1 / speeds[slow] + 1 / speeds[quick])
            load = min(load, layer.shares[expert, slow] - least)
            layer.shares[expert, slow] -= load
            layer.shares[expert, quick] += load
            layer.times[slow] -= load / speeds[slow]
            layer.times[quick] += load / speeds[quick]
            most = max(most, load / speeds[slow])
        if most < 1e-3 * fair:
            return


@compiled
def _improve(layer: _Layer, fleet: Fleet, min_replicas: int, per_layer: float, floor: float, even_part: float, fair: float) -> Bools:
    """Takes steps as long as there are any; the placement [E, H] on the way that was worth most, the first one if none was."""
    layer_bytes = 1.0
    for expert in range(len(layer.weights)):
        layer_bytes += layer.replicas[expert] * layer.sizes[expert]
    price_per_byte = per_layer / layer_bytes
    best, best_value = layer.holds.copy(), fair / layer.times.max() + floor
    for _ in range(8 * len(layer.times) + 16):
        step = _best_step(layer, fleet, min_replicas, price_per_byte, fair)
        if step.expert < 0:
            break
        if step.other >= 0:
            _close(step.other, step.target, layer, fleet.speeds)
        if not step.copies:
            _close(step.expert, step.source, layer, fleet.speeds)
            if step.other >= 0:
                _open(step.other, step.source, layer)
        _open(step.expert, step.target, layer)
        _split_evenly(step.expert, layer, fleet.speeds)
        if step.other >= 0:
            _split_evenly(step.other, layer, fleet.speeds)
        _level(layer, fleet.speeds, even_part, fair)
        value = fair / layer.times.max() - price_per_byte * layer.new_bytes[0]
        if value > best_value + 1e-9:
            best, best_value = layer.holds.copy(), value
    return best


@compiled
def _best_step(layer: _Layer, fleet: Fleet, min_replicas: int, price_per_byte: float, fair: float) -> _Step:
    """The step that most relieves the busiest host, its bytes counted; `expert` is -1 if there is none."""
    speeds, times, held, num_held, shares, sizes = fleet.speeds, layer.times, layer.held, layer.num_held, layer.shares, layer.sizes
    source = int(np.argmax(times))
    best, best_score = _Step(-1, source, -1, -1, False), times[source] / fair - SMALLEST_STEP
    elsewhere = np.empty(len(sizes), dtype=np.int64)
    is_seen = fleet.slots <= 0
    is_seen[source] = True
    for _ in range(NUM_TARGETS):
        target = _least_busy(times, is_seen)
        if target < 0:
            break
        is_seen[target] = True
        pace = 1 / speeds[source] + 1 / speeds[target]
        has_slot = num_held[target] < layer.quotas[target] and layer.used_slots[target] < fleet.slots[target]
        bytes_left = fleet.bytes[target] - layer.used_bytes[target]
        source_bytes_left = fleet.bytes[source] - layer.used_bytes[source]
        for place in range(num_held[target]):
            other = held[target, place]
            is_spare = layer.replicas[other] > min_replicas and _may_leave(other, target, -1, layer, fleet.nodes, min_replicas)
            elsewhere[place] = _quickest_other(other, target, layer) if is_spare else -1
        for source_place in range(num_held[source]):
            expert = held[source, source_place]
            size, share = sizes[expert], shares[expert, source]
            cost = 0.0 if layer.origin[expert, target] else price_per_byte * size
            if layer.holds[expert, target] or times[target] / fair + cost >= best_score:
                continue
            without = times[source] - share / speeds[source]
            moves = min_replicas == 1 or _may_leave(expert, source, target, layer, fleet.nodes, min_replicas)
            if moves and has_slot and size <= bytes_left:
                score = max(without, times[target] + share / speeds[target]) / fair + cost
                if score < best_score:
                    best, best_score = _Step(expert, source, target, -1, False), score
            for place in range(num_held[target]):
                other = held[target, place]
                other_share = shares[other, target]
                if size - sizes[other] > bytes_left:
                    continue
                relieved = times[target] - other_share / speeds[target]
                if moves and other_share < share and not layer.holds[other, source] and sizes[other] - size <= source_bytes_left:
                    back = 0.0 if layer.origin[other, source] else price_per_byte * sizes[other]
                    score = max(without + other_share / speeds[source], relieved + share / speeds[target]) / fair + cost + back
                    if score < best_score and (min_replicas == 1 or _may_leave(other, target, source, layer, fleet.nodes, min_replicas)):
                        best, best_score = _Step(expert, source, target, other, False), score
                host = elsewhere[place]
                if host >= 0:  # a copy in place of the other's, whose load goes to the quickest of its other hosts
                    here = times[source] + (other_share / speeds[source] if host == source else 0.0)
                    load = min((here - relieved) / pace, share)
                    peak = max(here - load / speeds[source], relieved + load / speeds[target])
                    if host != source:
                        peak = max(peak, times[host] + other_share / speeds[host])
                    if peak / fair + cost < best_score:
                        best, best_score = _Step(expert, source, target, other, True), peak / fair + cost
    return best


@compiled
def _least_busy(times: Floats, is_seen: Bools) -> int:
    best = -1
    for host in range(len(times)):
        if not is_seen[host] and (best < 0 or times[host] < times[best]):
            best = host
    return best


@compiled
def _quickest_other(expert: int, host: int, layer: _Layer) -> int:
    """The least busy of the expert's hosts but this one."""
    quickest = -1
    for place in range(layer.replicas[expert]):
        other = layer.holders[expert, place]
        if other != host and (quickest < 0 or layer.times[other] < layer.times[quickest]):
            quickest = other
    return quickest


@compiled
def _may_leave(expert: int, source: int, target: int, layer: _Layer, nodes: Ints, min_replicas: int) -> bool:
    """Whether enough replicas on enough nodes are left if the expert goes from `source` to `target` (-1: nowhere)."""
    if layer.replicas[expert] - (1 if target < 0 else 0) < min_replicas:
        return False
    before, after = np.zeros(len(nodes), dtype=np.int64), np.zeros(len(nodes), dtype=np.int64)
    for place in range(layer.replicas[expert]):
        host = layer.holders[expert, place]
        before[nodes[host]] = 1
        if host != source:
            after[nodes[host]] = 1
    if target >= 0:
        after[nodes[target]] = 1
    return after.sum() >= min(min_replicas, before.sum())  # type: ignore[no-any-return]
