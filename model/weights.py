"""Safetensors checkpoints: headers checked first, then exactly the tensors asked for, nothing else read."""

from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Where an architecture takes its tensors from; a checkpoint, or shapes alone on the `meta` device."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        ...

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the source's device, in the source's compute dtype or `dtype`. CheckpointError on absence or shape."""
        ...

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:
        """Part `index` of a stacked tensor whose whole shape is (num_parts, *shape); only that part is read."""
        ...
