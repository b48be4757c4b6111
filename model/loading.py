"""From a checkpoint directory to the dense part on a device, or to the certainty that everything in it is as it should be."""

import logging
from pathlib import Path

import torch

from model.architectures import build, load_expert, read_config
from model.causal_lm import CausalLM
from model.config import ModelConfig
from model.logical_expert import LogicalExpert
from model.weights import Checkpoint

logger = logging.getLogger("shoal")


def logical_experts(config: ModelConfig) -> list[LogicalExpert]:
    """Every routed expert of the model, layer by layer."""
    return [LogicalExpert(layer, expert) for layer in config.moe_layers for expert in range(config.num_routed_experts)]


def load_dense(directory: Path | str, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The dense part alone: no routed expert's bytes are read. Raises CheckpointError or UnsupportedModel."""
    return build(read_config(directory), Checkpoint(directory, device, dtype))


def check_checkpoint(directory: Path | str) -> ModelConfig:
    """Takes every tensor that serving will take, as a shape without its bytes. Raises CheckpointError or UnsupportedModel.

    Tensors that nothing uses are named in one warning: they may be a feature that the config does not mention.
    """
    config = read_config(directory)
    checkpoint = Checkpoint(directory, "meta", torch.float32)
    build(config, checkpoint)
    for expert in logical_experts(config):
        load_expert(config, checkpoint, expert)
    unused = sorted(name for name in checkpoint.unused() if not name.startswith(tuple(config.ignored_tensor_prefixes)))
    if unused:
        logger.warning("%d tensors of %s are not used, the first is %s", len(unused), directory, unused[0])
    return config
