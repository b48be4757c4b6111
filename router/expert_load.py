"""How many tokens were routed to each expert: what the Coordinator plans by."""

import threading

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.logical_expert import LogicalExpert


class ExpertLoad:
    """Counts since the last `take`, which may come from another thread than `count`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[int, NDArray[np.int64]] = {}

    def count(self, layer: int, expert_ids: Tensor, num_experts: int) -> int:
        """Adds the choices [T, K], on the CPU; returns E: num_experts, or more where an id is beyond it."""
        counts = np.bincount(expert_ids.numpy().ravel(), minlength=num_experts)
        with self._lock:
            known = self._layers.get(layer)
            if known is None:
                self._layers[layer] = counts
            elif len(known) == len(counts):
                known += counts
            else:
                longer, shorter = (known, counts) if len(known) > len(counts) else (counts, known)
                self._layers[layer] = longer
                longer[: len(shorter)] += shorter
        return len(counts)

    def take(self) -> dict[LogicalExpert, int]:
        """The counts, without the zeros, and begins anew."""
        with self._lock:
            layers, self._layers = self._layers, {}
        return {
            LogicalExpert(layer, expert): count for layer, counts in layers.items() for expert, count in enumerate(counts.tolist()) if count
        }
