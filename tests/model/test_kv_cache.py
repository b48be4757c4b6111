"""The paged cache: what is written at a slot is read where a table says."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kv_cache import CacheLayout, PagedCache

torch.set_num_threads(1)
LAYOUT = CacheLayout(2, ((3,), (2, 4)), torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 1), st.integers(0, 99))
def test_reads_what_was_written(page_size: int, lengths: list[int], layer: int, seed: int) -> None:
    pages = list(range(sum(-(-length // page_size) for length in lengths)))
    cache = PagedCache(LAYOUT, len(pages) + 1, page_size, torch.device("cpu"))
    random.Random(seed).shuffle(pages)
    written = [(torch.rand(length, 3), torch.rand(length, 2, 4)) for length in lengths]
    tables = [[pages.pop() for _ in range(-(-length // page_size))] for length in lengths]
    for table, entries in zip(tables, written, strict=True):
        slots = [table[position // page_size] * page_size + position % page_size for position in range(len(entries[0]))]
        cache.write(layer, torch.tensor(slots), *entries)
    width = max(map(len, tables))
    block_tables = torch.tensor([table + [0] * (width - len(table)) for table in tables])
    read = cache.read(layer, block_tables, max(lengths))
    for entry, shape in zip(read, LAYOUT.entries, strict=True):
        assert entry.shape == (len(lengths), max(lengths), *shape)
    for sequence, (length, entries) in enumerate(zip(lengths, written, strict=True)):
        for found, expected in zip(read, entries, strict=True):
            assert torch.equal(found[sequence, :length], expected)
    assert not any(entry.any() for entry in cache.layers[1 - layer])


def test_bytes_per_token() -> None:
    assert LAYOUT.bytes_per_token == 2 * (3 + 8) * 4


def test_number_of_entries_is_the_layouts() -> None:
    cache = PagedCache(LAYOUT, 2, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="zip"):
        cache.write(0, torch.tensor([0]), torch.zeros(1, 3))
