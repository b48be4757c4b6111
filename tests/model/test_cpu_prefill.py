"""Prompts' attention on a CPU: whatever the chunks, heads and window, what torch's own gives in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from model import cpu_prefill
from model.cpu_prefill import Heads, attend_chunks


@st.composite
def chunks_of(draw):
    """(first query, queries, first key, keys) of some chunks, one behind the other."""
    chunks, query, key = [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        num_queries = draw(st.integers(1, 70))
        num_keys = num_queries + draw(st.sampled_from([0, 1, 40, 150]))
        chunks.append((query, num_queries, key, num_keys))
        query, key = query + num_queries, key + num_keys
    return chunks


def oracle(heads, chunk, scale, window):
    first, num_queries, first_key, num_keys = chunk
    tokens, context = slice(first, first + num_queries), slice(first_key, first_key + num_keys)
    query = torch.cat((heads.query, heads.query_rope), dim=-1)[tokens].double()
    share, shared_by = query.shape[1] // heads.key.shape[1], query.shape[1] // max(heads.key_rope.shape[1], 1)
    key_rope = heads.key_rope.repeat_interleave(shared_by, dim=1)
    key = torch.cat((heads.key.repeat_interleave(share, dim=1), key_rope), dim=-1)[context].double()
    value = heads.value.repeat_interleave(share, dim=1)[context].double()
    places, keys = torch.arange(num_keys - num_queries, num_keys).unsqueeze(1), torch.arange(num_keys)
    mask = (keys <= places) & (keys > places - (window or num_keys + 1))
    attended = scaled_dot_product_attention(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), mask, scale=scale)
    return attended.transpose(0, 1)


def check(heads, chunks, scale, window):
    out = torch.full((len(heads.query), heads.query.shape[1], heads.value.shape[2]), float("nan"))
    attend_chunks(heads, torch.tensor(chunks), scale, window, out)
    for chunk in chunks:
        expected = oracle(heads, chunk, scale, window)
        torch.testing.assert_close(out[chunk[0] : chunk[0] + chunk[1]].double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    chunks=chunks_of(),
    num_heads=st.sampled_from([1, 4]),
    own=st.integers(1, 40),
    rope=st.integers(1, 20),
    value=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_latent_attention_one_turned_key_for_all_heads(chunks, num_heads, own, rope, value, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_keys = chunks[-1][0] + chunks[-1][1], chunks[-1][2] + chunks[-1][3]
    query = torch.randn(num_tokens, num_heads, own + rope, generator=generator)
    expanded = torch.randn(num_keys, num_heads, own + value, generator=generator)
    key_rope = torch.randn(num_keys, 1, rope + 3, generator=generator)[..., 3:]
    check(Heads(query[..., :own], query[..., own:], expanded[..., :own], key_rope, expanded[..., own:]), chunks, own**-0.5, None)


@settings(max_examples=60, deadline=None)
@given(
    chunks=chunks_of(),
    heads=st.sampled_from([(1, 1), (4, 1), (8, 2), (3, 3)]),
    dim=st.integers(1, 80),
    window=st.sampled_from([None, 1, 9, 64, 1000]),
    seed=st.integers(0, 2**31),
)
def test_grouped_queries_and_windows(chunks, heads, dim, window, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_keys = chunks[-1][0] + chunks[-1][1], chunks[-1][2] + chunks[-1][3]
    query = torch.randn(num_tokens, heads[0], dim, generator=generator)
    key, value = (torch.randn(num_keys, heads[1], dim, generator=generator) for _ in range(2))
    check(Heads(query, query[..., :0], key, key[..., :0], value), chunks, dim**-0.5, window)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_shares_change_nothing(monkeypatch, num_threads):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(300, 4, 16, generator=generator) for _ in range(3))
    heads = Heads(query, query[..., :0], key, key[..., :0], value)
    outs = [torch.empty(300, 4, 16), torch.empty(300, 4, 16)]
    chunks = torch.tensor([(0, 200, 0, 200), (200, 100, 200, 100)])
    attend_chunks(heads, chunks, 0.25, None, outs[0])
    monkeypatch.setattr(cpu_prefill, "num_shares_of", lambda _: num_threads)
    attend_chunks(heads, chunks, 0.25, None, outs[1])
    assert torch.equal(*outs)


def test_a_long_context_has_smaller_blocks_and_the_same_sums():
    generator = torch.Generator().manual_seed(2)
    num_keys = cpu_prefill._BLOCK_SCORES // cpu_prefill.NUM_TOKENS + 100
    query, key, value = torch.randn(20, 1, 8, generator=generator), *(torch.randn(num_keys, 1, 8, generator=generator) for _ in range(2))
    check(Heads(query, query[..., :0], key, key[..., :0], value), [(0, 20, 0, num_keys)], 0.3, None)
