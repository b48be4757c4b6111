"""Block-scaled FP8 as DeepSeek-V3 stores it, widened at load.

A weight [N, K] is float8_e4m3fn, and beside it lies `weight_scale_inv` float32, one factor per block of `weight_block_size`
rows x columns; the last block of a row or column may be short. The weight's value is fp8 x factor (DeepSeek-V3,
inference/kernel.py, weight_dequant).
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"


class BlockSize(NamedTuple):
    """Weight elements that share one factor."""

    rows: int
    columns: int

    def num_blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the factors of a weight [N, K], short blocks counted."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


def read_block_size(config_file: Path) -> BlockSize:
    """quantization_config.weight_block_size of a config.json; CheckpointError if that is not block-scaled FP8."""
    try:
        config = json.loads(config_file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file}: expected a quantization_config for the FP8 weights, found: {error}") from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not (isinstance(size, list) and len(size) == 2 and all(type(item) is int and item > 0 for item in size)):
        raise CheckpointError(
            f"{config_file}: quantization_config.weight_block_size: FP8 weights need two positive integers (rows, columns), found {size!r}"
        )
    return BlockSize(size[0], size[1])


def dequantize(weight: Tensor, scale_inv: Tensor, block: BlockSize, dtype: torch.dtype) -> Tensor:
    """The values of weight [N, K] float8 with factors [N / rows, K / columns] float32, multiplied in float32, as `dtype`."""
    assert tuple(scale_inv.shape) == block.num_blocks(tuple(weight.shape))
    widened = weight.to(torch.float32)
    for row, factors in enumerate(scale_inv.repeat_interleave(block.columns, dim=1)[:, : weight.shape[1]]):
        # Block rows one at a time: factors for the whole weight would take as much again as the weight itself.
        widened[row * block.rows : (row + 1) * block.rows].mul_(factors)
    return widened.to(dtype)
