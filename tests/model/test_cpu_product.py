"""The product on a CPU: whatever the sizes, the storage and the threads, the sum that float64 gives, and the same bits in any company."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import cpu_product, cpu_threads, cpu_tile
from model.cpu_exp import exp
from model.weights import STORED_DTYPES


@settings(max_examples=80, deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    num_rows=st.integers(1, 40),
    length=st.integers(1, 70),
    dtype=st.sampled_from(STORED_DTYPES),
    seed=st.integers(0, 2**31),
)
@example(num_tokens=300, num_rows=9, length=640, dtype=torch.bfloat16, seed=0)  # more tokens than a block
def test_any_sizes(num_tokens, num_rows, length, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, length, generator=generator)
    weight = (torch.randn(num_rows, length, generator=generator) / length**0.5).to(dtype)
    assert cpu_product.linear(x, weight) == pytest.approx(x.double() @ weight.double().T, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 300), length=st.integers(1, 700), dtype=st.sampled_from(STORED_DTYPES), seed=st.integers(0, 2**31))
def test_a_token_gets_the_same_bits_in_any_company(num_tokens, length, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(num_tokens, length, generator=generator), torch.randn(9, length, generator=generator).to(dtype)
    together = cpu_product.linear(x, weight)
    place = int(torch.randint(num_tokens, (), generator=generator))
    assert torch.equal(cpu_product.linear(x[place : place + 1], weight)[0], together[place])
    assert torch.equal(cpu_product.linear(x, weight.float()), together)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_shares_change_nothing(monkeypatch, num_threads):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(1001, 64, generator=generator).bfloat16()
    alone = cpu_product.linear(x, weight)
    monkeypatch.setattr(cpu_threads, "num_shares_of", lambda _: num_threads)
    assert torch.equal(cpu_product.linear(x, weight), alone)


def test_more_dimensions_and_rows_that_are_not_close_together():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 3, 32, generator=generator)[..., :16], torch.randn(7, 16, generator=generator)
    torch.testing.assert_close(cpu_product.linear(x, weight), x @ weight.T)


def test_compiles_without_a_place_to_cache(monkeypatch):
    real = cpu_product.njit

    def without_cache(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(cpu_product, "njit", without_cache)
    assert cpu_product.compiled(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize(
    ("name", "features", "width"),
    [("x86-64-v3", "", 8), ("x86-64-v4", None, 16), ("znver4", "+avx2,+avx512f", 16), ("neoverse-n1", None, 8)],
)
def test_vectors_are_those_of_the_cpu_that_is_compiled_for(name, features, width):
    assert cpu_tile.vector_width(name, features) == width


def test_exponentials_are_those_of_float64():
    x = torch.linspace(-87, 88, 20001).numpy()
    found = cpu_product.compiled(_exponentials)(x)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(found - expected) <= 4 * np.spacing(expected.astype(np.float32))).all()


def _exponentials(x):
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = exp(x[i])
    return y
