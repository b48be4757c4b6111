"""How many tokens were routed to each expert: what the Coordinator plans by."""

import threading

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.logical_expert import LogicalExpert

MAX_PENDING = 64


class ExpertLoad:
    """Counts since the last `take`, which may come from another thread than `count`.

    The token path only keeps the choices; they are counted many batches at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, list[NDArray[np.int16]]] = {}
        self._layers: dict[int, NDArray[np.int64]] = {}

    def count(self, layer: int, expert_ids: Tensor, num_experts: int) -> int:
        """Adds the choices [T, K], on the CPU, which must stay as they are; returns E: num_experts, or more where an id is beyond it."""
        ids = expert_ids.numpy()
        with self._lock:
            pending = self._pending.setdefault(layer, [])
            pending.append(ids)
            if len(pending) >= MAX_PENDING:
                self._fold(layer)
        return max(num_experts, int(ids.max(initial=-1)) + 1)

    def _fold(self, layer: int) -> None:
        counts = np.bincount(np.concatenate([ids.ravel() for ids in self._pending.pop(layer)]))
        known = self._layers.get(layer, counts[:0])
        longer, shorter = (known, counts) if len(known) > len(counts) else (counts, known)
        longer[: len(shorter)] += shorter
        self._layers[layer] = longer

    def take(self) -> dict[LogicalExpert, int]:
        """The counts, without the zeros, and begins anew."""
        with self._lock:
            for layer in list(self._pending):
                self._fold(layer)
            layers, self._layers = self._layers, {}
        return {
            LogicalExpert(layer, expert): count for layer, counts in layers.items() for expert, count in enumerate(counts.tolist()) if count
        }
