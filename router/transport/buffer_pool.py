"""Which parts of a shared buffer are in use: a buddy allocator that merges only when it must."""

from router.errors import ChannelFull

MIN_BUFFER_BYTES = 4096


class BufferPool:
    """Hands out offsets of buffers of 4096 x 2^n bytes, each at a multiple of its size.

    A released buffer is the next one of its size to be used again, so that a steady load stays in few, warm pages; free
    neighbours are merged only when there is nothing else left.
    """

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < MIN_BUFFER_BYTES or num_bytes & (num_bytes - 1):
            raise ValueError(f"a shared buffer has a power of two of bytes, at least {MIN_BUFFER_BYTES}, not {num_bytes}")
        self.num_bytes = num_bytes
        self.num_bytes_set_aside = 0
        self._free: list[list[int]] = [[] for _ in range(_order_of(num_bytes) + 1)]
        self._free[-1].append(0)
        self._orders: dict[int, int] = {}
        self._may_merge = False

    def allocate(self, num_bytes: int) -> int:
        """The offset of a buffer of at least `num_bytes`; ChannelFull if there is none."""
        order = _order_of(num_bytes)
        offset = self._take(order)
        if offset is None and self._may_merge:
            self._merge()
            offset = self._take(order)
        if offset is None:
            raise ChannelFull(
                f"no buffer of {num_bytes} bytes is free: the channel has {self.num_bytes}, "
                f"{self.num_bytes_set_aside} of them set aside after time-outs"
            )
        self._orders[offset] = order
        return offset

    def size_of(self, offset: int) -> int:
        """Bytes of a buffer that is in use, be they more than were asked for."""
        return MIN_BUFFER_BYTES << self._orders[offset]

    def release(self, offset: int) -> None:
        """The buffer may be used again."""
        self._free[self._orders.pop(offset)].append(offset)
        self._may_merge = True

    def set_aside(self, offset: int) -> None:
        """The buffer is never used again: somebody may still write to it."""
        self.num_bytes_set_aside += MIN_BUFFER_BYTES << self._orders.pop(offset)

    def _take(self, order: int) -> int | None:
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                offset = self._free[larger].pop()
                for half in range(larger - 1, order - 1, -1):
                    self._free[half].append(offset + (MIN_BUFFER_BYTES << half))
                return offset
        return None

    def _merge(self) -> None:
        for order in range(len(self._free) - 1):
            size = MIN_BUFFER_BYTES << order
            free = set(self._free[order])
            merged = {offset for offset in free if not offset & size and offset + size in free}
            self._free[order] = [offset for offset in self._free[order] if offset & ~size not in merged]
            self._free[order + 1].extend(merged)
        self._may_merge = False


def _order_of(num_bytes: int) -> int:
    return max(0, (num_bytes - 1).bit_length() - (MIN_BUFFER_BYTES - 1).bit_length())
