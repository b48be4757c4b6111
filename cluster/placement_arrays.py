"""A planning problem as arrays: what the compiled halves of the planner read and write.

N experts sorted by (layer, expert), L layers, H hosts in the order of their keys. `holds` [N, H] says who holds what.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Reasons = NDArray[np.int8]

UNLIMITED = 1 << 60
# An expert that nobody chose is planned as if it had this share of its layer's mean load: tomorrow somebody may.
LEAST_WEIGHT = 0.01


class Fleet(NamedTuple):
    """H hosts: `slots` over all layers (0: takes nothing), `bytes`, `speeds`, and `nodes` as numbers below H."""

    slots: Ints
    bytes: Ints
    speeds: Floats
    nodes: Ints


class Model(NamedTuple):
    """Those of layer l lie from starts[l] to starts[l + 1]: `weights` are loads over the layer's mean; `sizes` in bytes.

    `order` [N] are the experts layer by layer, most load first.
    """

    starts: Ints
    layers: Ints
    weights: Floats
    sizes: Ints
    order: Ints


class Wanted(NamedTuple):
    """Replicas of each expert at least, `replicas` [L] of a layer in all, and `quotas` [L, H]: how many of these on a host."""

    min_replicas: int
    replicas: Ints
    quotas: Ints


def model_of(
    experts: Sequence[LogicalExpert], loads: Mapping[LogicalExpert, float], expert_bytes: int | Mapping[LogicalExpert, int]
) -> tuple[Model, Bools]:
    """`experts` sorted. Also which layers [L] have any load; in one that has none all experts weigh the same."""
    layers, starts = np.unique([expert[0] for expert in experts], return_index=True)
    ends = np.append(starts, len(experts)).astype(np.int64)
    weights = np.array([loads.get(expert, 0.0) for expert in experts], dtype=np.float64)
    has_load = np.zeros(len(layers), dtype=np.bool_)
    for index, (first, last) in enumerate(pairwise(ends.tolist())):
        mean = weights[first:last].mean()
        has_load[index] = mean > 0
        weights[first:last] = np.maximum(weights[first:last] / mean, LEAST_WEIGHT) if mean > 0 else 1.0
    of_layer = np.repeat(np.arange(len(layers)), np.diff(ends))
    if isinstance(expert_bytes, int):
        sizes = np.full(len(experts), expert_bytes, dtype=np.int64)
    else:
        sizes = np.array([expert_bytes[expert] for expert in experts], dtype=np.int64)
    order = np.lexsort((-weights, of_layer))
    return Model(ends, of_layer, weights, sizes, order), has_load


def holds_of(experts: Sequence[LogicalExpert], hosts: Sequence[HostKey], held: Mapping[HostKey, frozenset[LogicalExpert]]) -> Bools:
    """[N, H]; experts and hosts that are not ours are left out."""
    index_of = {expert: index for index, expert in enumerate(experts)}
    holds = np.zeros((len(experts), len(hosts)), dtype=np.bool_)
    for host, key in enumerate(hosts):
        holds[[index_of[expert] for expert in held.get(key, ()) if expert in index_of], host] = True
    return holds


def wanted_of(model: Model, fleet: Fleet, min_replicas: int, redundancy: float) -> Wanted:
    """Replicas as many as are asked for and fit; a host's share of them follows its speed as far as its slots and bytes go."""
    per_layer = np.diff(model.starts)
    num_hosts = int((fleet.slots > 0).sum())
    at_least = per_layer * min(min_replicas, num_hosts)
    spare = np.minimum(np.round(per_layer * redundancy).astype(np.int64), per_layer * num_hosts - at_least)
    mean_bytes = max(float(model.sizes.mean()), 1.0)
    room = np.minimum(np.minimum(fleet.slots, (fleet.bytes / mean_bytes).astype(np.int64)), len(model.weights))
    left = max(int(room.sum() - at_least.sum()), 0)
    if left < spare.sum():
        spare = np.floor(spare * left / spare.sum()).astype(np.int64)
    replicas = at_least + spare
    shares = _shares(int(replicas.sum()), room.astype(np.float64), fleet.speeds)
    quotas = np.ceil(np.outer(replicas / max(replicas.sum(), 1), shares) - 1e-9).astype(np.int64)
    return Wanted(max(min(min_replicas, num_hosts), 1), replicas, quotas)


def _shares(total: int, room: Floats, speeds: Floats) -> Floats:
    """[H]: `total` spread by speed, no host above its room."""
    shares = np.zeros(len(room))
    is_open = room > 0
    while is_open.any():
        left = total - shares[~is_open].sum()
        proposed = left * speeds / speeds[is_open].sum()
        full = is_open & (proposed >= room)
        if not full.any():
            return np.where(is_open, proposed, shares)
        shares[full] = room[full]
        is_open &= ~full
    return shares
