"""A batch's choices of experts, counted and grouped by host. Compiled: this is paid in every layer, for a few tokens each time."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.compiled import compiled

# In place of a host index: no host can be reached, and the choice is somebody else's (the id -1).
NOBODY = -1
NOT_WANTED = -2
# A host that gets all tokens but one in this many gets them all: leaving them out would cost a copy here and a scattered sum after.
FEW_SPARED = 16

Ids = NDArray[np.int16]
Ints = NDArray[np.int64]


@compiled
def count_choices(expert_ids: Ids, counts: Ints) -> int:
    """Adds the choices [T, K] to the counts [E]; returns the highest id, and leaves those from E on uncounted."""
    highest = -1
    for token in range(expert_ids.shape[0]):
        for choice in range(expert_ids.shape[1]):
            expert = expert_ids[token, choice]
            highest = max(highest, expert)
            if 0 <= expert < len(counts):
                counts[expert] += 1
    return highest


@compiled
def group_choices(expert_ids: Ids, hosts: Ints, num_hosts: int) -> Any:
    """Of the choices [T, K] and their hosts [T, K]: for NOBODY and each host the number of its tokens [1 + num_hosts], which those
    are [1 + num_hosts, T], and the ids that it is asked for [1 + num_hosts, T, K] with -1 where the expert is another's.

    A host of nearly all tokens gets all of them, in their order; those with no id but -1 cost it their bytes, and add 0.
    """
    num_tokens, top_k = expert_ids.shape
    sizes = np.zeros(num_hosts + 1, dtype=np.int64)
    last = np.zeros(num_hosts + 1, dtype=np.int64)  # the last token, counted from 1, that was counted for a host
    for token in range(num_tokens):
        for choice in range(top_k):
            group = hosts[token, choice] - NOBODY
            if group >= 0 and last[group] != token + 1:
                last[group] = token + 1
                sizes[group] += 1
    rows = np.empty((num_hosts + 1, num_tokens), dtype=np.int64)
    ids = np.empty((num_hosts + 1, num_tokens, top_k), dtype=np.int16)
    for group in range(num_hosts + 1):
        if sizes[group] == 0:
            continue
        takes_all = (num_tokens - sizes[group]) * FEW_SPARED <= num_tokens
        size = 0
        for token in range(num_tokens):
            is_wanted = takes_all
            for choice in range(top_k):
                is_here = hosts[token, choice] - NOBODY == group
                ids[group, size, choice] = expert_ids[token, choice] if is_here else -1
                is_wanted |= is_here
            if is_wanted:
                rows[group, size] = token
                size += 1
        sizes[group] = size
    return sizes, rows, ids


@functools.cache
def prepare() -> None:
    """Compiles for this process: seconds the first time on a machine, milliseconds after."""
    ids = np.zeros((1, 1), dtype=np.int16)
    count_choices(ids, np.zeros(1, dtype=np.int64))
    group_choices(ids, np.zeros((1, 1), dtype=np.int64), 1)
