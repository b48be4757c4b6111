"""RoPE against transformers' own parameters, kind by kind and in both config forms, and its rotation against theirs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.errors import UnsupportedModel
from model.rope import Rotary, deinterleave, read_rope

torch.set_num_threads(1)
CPU = torch.device("cpu")


def theirs(rope: dict[str, Any], dim: int, length: int) -> LlamaRotaryEmbedding:
    # transformers writes into the dict that it is given.
    config = LlamaConfig(
        hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, max_position_embeddings=length, rope_parameters=dict(rope)
    )
    return LlamaRotaryEmbedding(config)


def ours(raw: dict[str, Any], dim: int, length: int) -> Rotary:
    return Rotary(read_rope(raw, 10_000.0, length), dim, CPU)


factors = st.floats(1.0, 40.0, width=32)
lengths = st.integers(8, 4096)
optional_scales = st.one_of(st.none(), st.floats(0.1, 2.0))


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 500_000.0]))}
    if kind != "default":
        rope["factor"] = draw(factors)
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw(lengths)
    if kind == "llama3":
        rope["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        rope["high_freq_factor"] = rope["low_freq_factor"] + draw(st.floats(0.5, 6.0))
    if kind == "yarn":
        given_ = {
            "beta_fast": draw(st.one_of(st.none(), st.integers(16, 40))),
            "beta_slow": draw(st.one_of(st.none(), st.integers(1, 8))),
            "mscale": draw(optional_scales),
            "mscale_all_dim": draw(optional_scales),
            "attention_factor": draw(optional_scales),
            "truncate": draw(st.sampled_from([None, True, False])),
        }
        rope |= {key: value for key, value in given_.items() if value is not None}
    return rope


def as_old_form(rope: dict[str, Any]) -> dict[str, Any]:
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling == {"type": "default"} else scaling}


@settings(max_examples=150, deadline=None)
@given(ropes(), st.sampled_from([4, 8, 24, 64]), lengths, st.integers(1, 300), st.booleans())
def test_angles(rope: dict[str, Any], dim: int, length: int, num_tokens: int, is_old_form: bool) -> None:
    positions = torch.arange(num_tokens)
    cos, sin = theirs(rope, dim, length)(torch.zeros(1), positions.unsqueeze(0))
    raw = as_old_form(rope) if is_old_form else {"rope_parameters": rope}
    rotation = ours(raw, dim, length)(positions, torch.full_like(positions, num_tokens), torch.float32)
    torch.testing.assert_close(rotation.cos, cos[0, :, : dim // 2], rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(rotation.sin, sin[0, :, : dim // 2], rtol=1e-4, atol=3e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=4))
def test_dynamic_is_a_request_alone(requests: list[tuple[int, int]]) -> None:
    """transformers grows its frequencies with the sequence and resets them; each request alone begins from the plain ones.

    A request of exactly the model's length is left out: there transformers keeps what the request before it grew.
    """
    length = 16
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    rotary = ours({"rope_parameters": rope}, 8, length)
    shared = theirs(rope, 8, length)
    for prompt_len, num_generated in requests:
        is_reset = prompt_len < length
        stateful = shared if is_reset else theirs(rope, 8, length)
        steps = [torch.arange(prompt_len)] + [torch.tensor([prompt_len + step]) for step in range(num_generated)]
        for positions in steps:
            cos, _ = stateful(torch.zeros(1), positions.unsqueeze(0))
            sequence_length = max(prompt_len, int(positions[-1]) + 1)
            found = rotary(positions, torch.full_like(positions, sequence_length), torch.float32)
            torch.testing.assert_close(found.cos, cos[0, :, :4], rtol=1e-4, atol=1e-4)


def test_dynamic_scales_each_token_by_its_own_length() -> None:
    rotary = ours({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 8, 16)
    together = rotary(torch.tensor([30, 30, 5]), torch.tensor([31, 60, 6]), torch.float32)
    for row, (position, length) in enumerate([(30, 31), (30, 60), (5, 6)]):
        alone = rotary(torch.tensor([position]), torch.tensor([length]), torch.float32)
        assert torch.equal(together.cos[row], alone.cos[0])
    assert not torch.equal(together.cos[0], together.cos[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.sampled_from([2, 8, 24]), st.integers(0, 2**31))
def test_rotation(num_tokens: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_tokens, 3, dim, generator=generator)
    rotary = ours({}, dim, 64)
    positions = torch.randint(0, 64, (num_tokens,), generator=generator)
    rotation = rotary(positions, positions + 1, torch.float32)
    cos, sin = torch.cat((rotation.cos, rotation.cos), -1), torch.cat((rotation.sin, rotation.sin), -1)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rotation(heads), expected)
    # Interleaved queries and keys give the same scores once their dimensions are put apart.
    query, key = heads.transpose(0, 1).unsqueeze(0), heads.flip(1).transpose(0, 1).unsqueeze(0)
    turned_query, turned_key = apply_rotary_pos_emb_interleave(query, key, cos.unsqueeze(0), sin.unsqueeze(0))
    apart_query = rotation(deinterleave(heads.transpose(1, 2)).transpose(1, 2))
    apart_key = rotation(deinterleave(heads.flip(1).transpose(1, 2)).transpose(1, 2))
    scores = apart_query.transpose(0, 1) @ apart_key.permute(1, 2, 0)
    torch.testing.assert_close(scores, (turned_query @ turned_key.transpose(2, 3))[0], rtol=1e-4, atol=1e-4)


def test_softmax_scale_factor_is_mscale_squared() -> None:
    rope = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}
    config = read_rope({"rope_scaling": rope}, 10_000.0, 163_840)
    assert config.softmax_scale_factor == pytest.approx((0.1 * 0.707 * 3.6888794541) ** 2 + 2 * 0.1 * 0.707 * 3.6888794541 + 1)
    assert config.attention_scaling == 1.0
    assert read_rope({}, 10_000.0, 2048).softmax_scale_factor == 1.0


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "su"}}, "su"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "factor"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "theta"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"original_max_position_embeddings": "4096", "rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
    ],
)
def test_refused(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read_rope(raw, 10_000.0, 2048)


def test_the_original_length_defaults_to_the_models_own() -> None:
    raw = {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    assert read_rope(raw, 10_000.0, 2048).original_max_position_embeddings == 2048
    assert read_rope(raw | {"original_max_position_embeddings": 512}, 10_000.0, 2048).original_max_position_embeddings == 512
