"""How many tokens were routed to each expert: what the Coordinator plans by."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.logical_expert import LogicalExpert
from router.grouping import count_choices, prepare


class ExpertLoad:
    """Counts since the last `take`, which may come from another thread than `count`."""

    def __init__(self) -> None:
        prepare()
        self._lock = threading.Lock()
        self._layers: dict[int, NDArray[np.int64]] = {}

    def count(self, layer: int, expert_ids: NDArray[np.int16], num_experts: int) -> int:
        """Adds the choices [T, K], C-contiguous; returns E: num_experts, or more where an id is beyond it."""
        with self._lock:
            counts = self._layers.get(layer)
            if counts is None or len(counts) < num_experts:
                counts = self._widen(layer, num_experts)
            highest: int = count_choices(expert_ids, counts)
            if highest >= len(counts):
                known = len(counts)
                beyond = expert_ids[expert_ids >= known]
                np.add.at(self._widen(layer, highest + 1), beyond, 1)
        return max(num_experts, highest + 1)

    @contextlib.contextmanager
    def counting(self, layer: int, num_experts: int) -> Iterator[NDArray[np.int64]]:
        """The layer's counts, E or more, for the caller to add to; nobody takes them meanwhile."""
        with self._lock:
            counts = self._layers.get(layer)
            yield self._widen(layer, num_experts) if counts is None or len(counts) < num_experts else counts

    def _widen(self, layer: int, num_experts: int) -> NDArray[np.int64]:
        wider = np.zeros(num_experts, dtype=np.int64)
        known = self._layers.get(layer, wider[:0])
        wider[: len(known)] = known
        self._layers[layer] = wider
        return wider

    def take(self) -> dict[LogicalExpert, int]:
        """The counts, without the zeros, and begins anew."""
        with self._lock:
            layers, self._layers = self._layers, {}
        return {
            LogicalExpert(layer, expert): count for layer, counts in layers.items() for expert, count in enumerate(counts.tolist()) if count
        }
