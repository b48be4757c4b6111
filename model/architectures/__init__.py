"""The families, one file each, named after their `model_type`. A new one is a file, a row here and a tiny-config test."""

import logging
from pathlib import Path

from model.architectures.deepseek_v2 import DeepseekV2
from model.architectures.deepseek_v3 import DeepseekV3
from model.architectures.llama import Llama
from model.architectures.mixtral import Mixtral
from model.causal_lm import CausalLM
from model.config import ModelConfig, read_json
from model.errors import UnsupportedModel
from model.experts import ExpertWeights
from model.logical_expert import LogicalExpert
from model.weights import TensorSource

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[str, type[DeepseekV2] | type[DeepseekV3] | type[Llama] | type[Mixtral]] = {
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
    "llama": Llama,
    "mixtral": Mixtral,
}


def read_config(directory: Path | str) -> ModelConfig:
    """The checked config of a checkpoint directory: its config.json, and generation_config.json where there is one.

    CheckpointError: a file is missing or not a JSON object. UnsupportedModel: names the key, its value and what is supported.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    return _family(raw.get("model_type")).config_type.parse(raw, generation)


def build(config: ModelConfig, source: TensorSource) -> CausalLM:
    """The dense part of a checkpoint. CheckpointError names a tensor that is missing or misshapen."""
    if config.ignored_tensor_prefixes:
        logger.info("not used by this model: tensors under %s", ", ".join(config.ignored_tensor_prefixes))
    family = _family(config.model_type)
    assert isinstance(config, family.config_type), "a config is built by its own family"
    return family(config, source)  # type: ignore[arg-type]  # the assert above, which mypy cannot follow through the table


def load_expert(config: ModelConfig, source: TensorSource, expert: LogicalExpert) -> ExpertWeights:
    """One routed expert, out of per-expert or fused tensors. CheckpointError names a tensor that is missing or misshapen."""
    return _family(config.model_type).load_expert(config, source, expert)


def _family(model_type: object) -> type[DeepseekV2] | type[DeepseekV3] | type[Llama] | type[Mixtral]:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModel(f"config.json: `model_type` is {model_type!r}; supported: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]
