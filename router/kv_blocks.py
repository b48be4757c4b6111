"""Which page of the key/value cache belongs to whom: a free list, nothing of tensors."""

import numpy as np
from numpy.typing import NDArray

from model.kv_cache import CacheLayout


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def default_num_pages(layout: CacheLayout, page_size: int, memory_bytes: int) -> int:
    """Pages of `page_size` tokens that fit into memory_bytes, at least one."""
    return max(1, memory_bytes // (page_size * layout.bytes_per_token))


class PageAllocator:
    """Pages 0 to num_pages - 1, each free or held by exactly one owner."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: the page released last is the one most likely still in a processor's cache.
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int64)
        self._held = np.zeros(num_pages, dtype=np.bool_)
        self._num_free = num_pages

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return self._num_free

    def allocate(self, num_pages: int) -> NDArray[np.int64] | None:
        """That many pages, or None and nothing taken if fewer are free."""
        if num_pages > self._num_free:
            return None
        self._num_free -= num_pages
        pages = self._free[self._num_free : self._num_free + num_pages].copy()
        self._held[pages] = True
        return pages

    def release(self, pages: NDArray[np.int64]) -> None:
        """Takes back pages that `allocate` gave, in any grouping."""
        assert self._held[pages].all(), "a page was released that nobody holds"
        self._held[pages] = False
        end = self._num_free + len(pages)
        assert self._num_free + len(pages) == self.num_pages - int(self._held.sum()), "a page was released twice in one call"
        self._free[self._num_free : end] = pages
        self._num_free = end
