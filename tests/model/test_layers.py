"""Layers against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model import cpu_silu, cpu_threads
from model.layers import Linear, RMSNorm, SwiGLU

torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4), st.integers(0, 2**31))
def test_stacked_maps_answer_side_by_side(parts: list[tuple[int, bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linears = [
        Linear(torch.randn(width, 5, generator=generator), torch.randn(width, generator=generator) if is_biased else None)
        for width, is_biased in parts
    ]
    x = torch.randn(3, 5, generator=generator)
    stacked = Linear.stack(*linears)
    torch.testing.assert_close(stacked(x), torch.cat([linear(x) for linear in linears], dim=-1))
    assert (stacked.bias is None) == (not any(is_biased for _, is_biased in parts))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1e-6, 1e-5, 1e-2]), st.sampled_from([1e-4, 1.0, 100.0]), st.integers(0, 2**31))
def test_rms_norm_is_transformers(width: int, eps: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(4, width, generator=generator) * scale, torch.randn(width, generator=generator)
    theirs = LlamaRMSNorm(width, eps)
    theirs.weight.data = weight
    torch.testing.assert_close(RMSNorm(weight, eps)(x), theirs(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in our compiled code, and as elsewhere
def test_swiglu_takes_gate_first(dtype: torch.dtype) -> None:
    gate, up, down, x = (torch.randn(shape, dtype=dtype) for shape in ((6, 4), (6, 4), (4, 6), (3, 4)))
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(SwiGLU(Linear(torch.cat((gate, up))), Linear(down))(x), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(0, 9), st.integers(1, 3), st.sampled_from([1e-3, 1.0, 30.0]), st.integers(0, 2**31))
def test_silu_times_is_torchs(inner: int, num_rows: int, num_threads: int, scale: float, seed: int) -> None:
    gate_up = torch.randn(num_rows, 2 * inner, generator=torch.Generator().manual_seed(seed)) * scale
    gate, up = gate_up.chunk(2, dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_threads, "num_shares_of", lambda _: num_threads)
        torch.testing.assert_close(cpu_silu.silu_times(gate_up), F.silu(gate) * up)


def test_silu_times_hands_on_what_is_not_finite() -> None:
    gate_up = torch.tensor([[float("nan"), 1.0, 1.0, float("inf"), 1.0, 1.0, float("nan"), 1.0]])
    assert cpu_silu.silu_times(gate_up).isfinite().tolist() == [[False, True, False, False]]
