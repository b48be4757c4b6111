"""A decode's attention on a CPU, over pages in any order: what softmax and sums over the gathered keys give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import cpu_attention, cpu_threads
from model.attention import DecodeGroup

SIZES = {
    "contexts": st.lists(st.integers(1, 70) | st.integers(120, 400), min_size=1, max_size=5),
    "page_size": st.sampled_from([1, 4, 5, 16]),
    "window": st.one_of(st.none(), st.integers(1, 20), st.integers(100, 300)),
    "num_threads": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
}


def make_group(contexts, page_size, window, generator):
    """Tables of pages in a random order, wider than any sequence needs; the number of pages."""
    width = -(-max(contexts) // page_size) + 1
    tables = torch.randperm(len(contexts) * width, generator=generator).view(len(contexts), width)
    last = torch.tensor(contexts)
    first = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
    return DecodeGroup.of_tables(tables, first, last), tables.numel()


def seen(stored, group, sequence, page_size):
    """The entries [keys, *] that a sequence sees."""
    positions = torch.arange(int(group.first[sequence]), int(group.last[sequence]))
    return stored[group.span.tables[sequence, positions // page_size] * page_size + positions % page_size].double()


def in_shares(monkeypatch, num_threads):
    monkeypatch.setattr(cpu_threads, "num_shares_of", lambda _: num_threads)


@settings(max_examples=40, deadline=None)
@given(
    num_heads=st.integers(1, 5),
    widths=st.tuples(*[st.integers(1, 40)] * 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    **SIZES,
)
def test_latents(num_heads, widths, dtype, contexts, page_size, window, num_threads, seed):
    generator = torch.Generator().manual_seed(seed)
    nope, rope, rank, value = widths
    group, num_pages = make_group(contexts, page_size, window, generator)
    latents = torch.randn(num_pages * page_size, rank + rope, generator=generator)
    queries = torch.randn(len(contexts), num_heads, nope + rope, generator=generator)
    up = torch.randn(num_heads, nope + value, rank, generator=generator).to(dtype)
    key_up, value_up = up[:, :nope].transpose(1, 2).contiguous(), up[:, nope:]
    with pytest.MonkeyPatch.context() as patch:
        in_shares(patch, num_threads)
        found = cpu_attention.latent(queries[..., :nope], queries[..., nope:], key_up, value_up, latents, 0.3, group, page_size)
    for sequence, query in enumerate(queries.double()):
        entries = seen(latents, group, sequence, page_size)
        keys = torch.cat((up[:, :nope].double().transpose(1, 2) @ query[:, :nope, None], query[:, nope:, None]), dim=1)
        shares = torch.softmax(0.3 * entries @ keys, dim=1).transpose(1, 2)
        expected = (shares @ entries[:, :rank] @ up[:, nope:].double().transpose(1, 2))[:, 0]
        torch.testing.assert_close(found[sequence].double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(num_kv=st.integers(1, 3), share=st.integers(1, 5), dim=st.integers(1, 40), **SIZES)
def test_grouped_queries(num_kv, share, dim, contexts, page_size, window, num_threads, seed):
    generator = torch.Generator().manual_seed(seed)
    group, num_pages = make_group(contexts, page_size, window, generator)
    keys, values = torch.randn(2, num_pages * page_size, num_kv, dim, generator=generator)
    queries = torch.randn(len(contexts), num_kv * share, dim, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        in_shares(patch, num_threads)
        found = cpu_attention.grouped(queries, keys, values, 1.0, group, page_size)
    for sequence, query in enumerate(queries.double()):
        for head in range(num_kv * share):
            own_keys, own_values = (seen(stored[:, head // share], group, sequence, page_size) for stored in (keys, values))
            expected = torch.softmax(own_keys @ query[head], dim=0) @ own_values
            torch.testing.assert_close(found[sequence, head].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sequence_gets_the_same_bits_in_any_company(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    group, num_pages = make_group([5, 40, 17, 300, 1, 33, 20, 129, 50], 16, None, generator)
    latents, up = torch.randn(num_pages * 16, 40, generator=generator), torch.randn(3, 24, 32, generator=generator).to(dtype)
    queries = torch.randn(9, 3, 20, generator=generator)
    maps = up[:, :12].transpose(1, 2).contiguous(), up[:, 12:]

    def attend(first, last, num_threads):
        in_shares(monkeypatch, num_threads)
        mine = DecodeGroup.of_tables(group.span.tables[first:last], group.first[first:last], group.last[first:last])
        return cpu_attention.latent(queries[first:last, :, :12], queries[first:last, :, 12:], *maps, latents, 0.3, mine, 16)

    together = attend(0, 9, 1)
    assert torch.equal(attend(0, 9, 2), together)
    assert torch.equal(attend(0, 9, 3), together)
    for place in range(9):
        assert torch.equal(attend(place, place + 1, 2)[0], together[place])
