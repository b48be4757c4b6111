import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.kv_cache import CacheLayout
from router.kv_blocks import PageAllocator, default_num_pages, pages_for


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and releases against a plain list of owners."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(13)
        self.owned: list[np.ndarray] = []

    @rule(num_pages=st.integers(0, 15))
    def allocate(self, num_pages):
        free = 13 - sum(len(pages) for pages in self.owned)
        pages = self.allocator.allocate(num_pages)
        assert (pages is None) == (num_pages > free)
        if pages is not None:
            assert len(pages) == num_pages
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data):
        self.allocator.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def no_page_has_two_owners(self):
        pages = [int(page) for owned in self.owned for page in owned]
        assert len(set(pages)) == len(pages)
        assert all(0 <= page < 13 for page in pages)
        assert self.allocator.num_free == 13 - len(pages)

    def teardown(self):
        for pages in self.owned:
            self.allocator.release(pages)
        everything = self.allocator.allocate(13)
        assert everything is not None
        assert sorted(everything.tolist()) == list(range(13))


TestAllocator = AllocatorMachine.TestCase


def test_releasing_twice_is_our_bug():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.release(pages)
    with pytest.raises(AssertionError):
        allocator.release(pages)
    taken = allocator.allocate(2)
    with pytest.raises(AssertionError):
        allocator.release(np.array([taken[0], taken[0]]))


@given(st.integers(0, 1000), st.integers(1, 64))
def test_pages_for(num_tokens, page_size):
    num_pages = pages_for(num_tokens, page_size)
    assert (num_pages - 1) * page_size < num_tokens <= num_pages * page_size


def test_default_num_pages_fills_the_memory():
    layout = CacheLayout(num_layers=3, entries=((2, 8), (2, 8)), dtype=torch.float32)
    page_bytes = 16 * 3 * 32 * 4
    assert default_num_pages(layout, 16, 10 * page_bytes + 5) == 10
    assert default_num_pages(layout, 16, 5) == 1
