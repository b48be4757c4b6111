"""Configs of real checkpoints are read; whatever is not computed exactly is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.architectures import ARCHITECTURES, build, load_expert, read_config
from model.architectures.deepseek_v3 import DeepseekV3Config
from model.errors import CheckpointError, UnsupportedModel
from model.logical_expert import LogicalExpert
from model.weights import ShapeSource
from tests.tiny_models import TINY

# As on the hub.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLM_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 102400,
}
REAL = {"deepseek_v2": V2_LITE, "deepseek_v3": V3, "mixtral": MIXTRAL, "llama": LLM_7B}


def write(directory: Path, config: object, generation: object = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize("family", REAL)
def test_real_checkpoints(family: str, tmp_path: Path) -> None:
    """Built whole on the meta device: no shape of theirs surprises the loader."""
    config = read_config(write(tmp_path, REAL[family]))
    assert type(config) is ARCHITECTURES[family].config_type
    small = config.model_copy(update={"num_hidden_layers": 4})
    model = build(small, ShapeSource())
    assert model.config is small
    if config.moe_layers:
        expert = load_expert(config, ShapeSource(), LogicalExpert(config.moe_layers[0], config.num_routed_experts - 1))
        assert expert.gate_up.shape == (2 * config.moe_intermediate_size, config.hidden_size)
        assert expert.down.shape == (config.hidden_size, config.moe_intermediate_size)


def test_what_the_engine_asks(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, V3))
    assert config.moe_layers == tuple(range(3, 61))
    assert (config.num_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (256, 8, 2048)
    assert config.ignored_tensor_prefixes == ("model.layers.61.",)
    assert config.max_position_embeddings == 163840
    dense = read_config(write(tmp_path, LLM_7B))
    assert (dense.moe_layers, dense.num_routed_experts, dense.ignored_tensor_prefixes) == ((), 0, ())


def test_the_prediction_layer_is_named_as_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        build(read_config(write(tmp_path, TINY["v3-yarn"].config)), ShapeSource())
    assert "model.layers.3." in caplog.text


def test_dynamic_rope_makes_the_model_longer(tmp_path: Path) -> None:
    """It does nothing within the config's length: what it is for lies beyond."""
    config = read_config(write(tmp_path, LLM_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.5}}))
    assert config.max_position_embeddings == 10240


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (None, None, ()),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        (2, {"eos_token_id": 0}, (0,)),
        (2, {"temperature": 0.6}, (2,)),
        (2, {"eos_token_id": None}, (2,)),
    ],
)
def test_end_tokens(config: object, generation: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert read_config(write(tmp_path, LLM_7B | {"eos_token_id": config}, generation)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
        ("llama", {"sliding_window": 4096}),
        ("llama", {"logit_scale": 0.5}),
        ("llama", {"rope": {"kind": "default"}}),
        ("llama", {"final_logit_softcapping": 30}),
        ("llama", {"num_key_value_heads": 5}),
        ("llama", {"num_attention_heads": 33, "num_key_value_heads": 33}),
        ("llama", {"head_dim": 127}),
        ("llama", {"hidden_size": "4096"}),
        ("llama", {"hidden_size": 0}),
        ("llama", {"vocab_size": True}),
        ("llama", {"rms_norm_eps": None}),
        ("llama", {"max_position_embeddings": None}),
        ("llama", {"max_position_embeddings": -1}),
        ("llama", {"eos_token_id": "</s>"}),
        ("llama", {"eos_token_id": [-1]}),
        ("llama", {"bos_token_id": 1.5}),
        ("llama", {"tie_word_embeddings": "yes"}),
        ("mixtral", {"num_experts_per_tok": 9}),
        ("mixtral", {"sliding_window": 0}),
        ("mixtral", {"attention_bias": True}),
        ("mixtral", {"hidden_act": None}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 5}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": None}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5}),
        ("deepseek_v2", {"num_key_value_heads": 8}),
        ("deepseek_v2", {"head_dim": 128}),
        ("deepseek_v2", {"qk_rope_head_dim": 63}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"mlp_bias": True}),
        ("deepseek_v3", {"n_group": 256, "topk_group": 8}),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 33}),
        ("deepseek_v3", {"index_topk": 2048}),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}}),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}}),
    ],
)
def test_refused_by_name(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read_config(write(tmp_path, REAL[family] | changes))
    assert any(f"`{key}`" in str(refusal.value) for key in changes)
    key = next(key for key in changes if f"`{key}`" in str(refusal.value))
    assert repr(changes[key]) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size", "num_attention_heads"])
def test_missing_keys(key: str, tmp_path: Path) -> None:
    raw = {name: value for name, value in LLM_7B.items() if name != key}
    with pytest.raises(UnsupportedModel, match=f"`{key}`"):
        read_config(write(tmp_path, raw))


@pytest.mark.parametrize("changes", [{"some_new_feature": False}, {"some_new_feature": None}, {"layer_types": []}, {"attn_extra": ""}])
def test_an_unknown_key_that_says_no_is_no_matter(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read_config(write(tmp_path, LLM_7B | changes)) == read_config(write(tmp_path, LLM_7B))


@pytest.mark.parametrize("model_type", [None, "gpt2", 3, ["llama"], "deepseek_v32"])
def test_unknown_model_type(model_type: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type.*deepseek_v2, deepseek_v3, llama, mixtral"):
        read_config(write(tmp_path, LLM_7B | {"model_type": model_type}))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_unreadable_files(content: bytes, file: str, tmp_path: Path) -> None:
    write(tmp_path, LLM_7B)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        read_config(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "nowhere")


def test_configs_are_values() -> None:
    raw = TINY["v3-yarn"].config
    config = DeepseekV3Config.parse(raw, {})
    assert config == DeepseekV3Config.parse(dict(raw), {})
    with pytest.raises(ValueError, match="frozen"):
        config.vocab_size = 3
