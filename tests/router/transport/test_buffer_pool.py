import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ChannelFull
from router.transport.buffer_pool import MIN_BUFFER_BYTES, BufferPool

POOL_BYTES = 64 * MIN_BUFFER_BYTES
actions = st.lists(
    st.tuples(st.sampled_from(["allocate", "allocate", "release", "set_aside"]), st.integers(1, POOL_BYTES), st.integers(0, 99)),
    max_size=80,
)


@given(actions)
def test_buffers_in_use_or_set_aside_never_overlap(actions):
    pool = BufferPool(POOL_BYTES)
    used: dict[int, int] = {}
    aside: dict[int, int] = {}
    for action, num_bytes, which in actions:
        if action == "allocate":
            try:
                offset = pool.allocate(num_bytes)
            except ChannelFull:
                continue
            assert offset % 64 == 0
            assert 0 <= offset <= POOL_BYTES - num_bytes
            for other, other_bytes in (used | aside).items():
                assert offset + num_bytes <= other or other + other_bytes <= offset
            used[offset] = num_bytes
        elif used:
            offset = sorted(used)[which % len(used)]
            size = used.pop(offset)
            if action == "release":
                pool.release(offset)
            else:
                pool.set_aside(offset)
                aside[offset] = size


@given(st.lists(st.integers(1, POOL_BYTES // 4), max_size=60))
def test_everything_released_can_be_had_as_one(sizes):
    pool = BufferPool(POOL_BYTES)
    offsets = []
    for size in sizes:
        try:
            offsets.append(pool.allocate(size))
        except ChannelFull:
            break
    for offset in offsets:
        pool.release(offset)
    assert pool.allocate(POOL_BYTES) == 0


def test_full_until_released():
    pool = BufferPool(4 * MIN_BUFFER_BYTES)
    offsets = [pool.allocate(1) for _ in range(4)]
    assert sorted(offsets) == [0, 4096, 8192, 12288]
    with pytest.raises(ChannelFull):
        pool.allocate(1)
    pool.release(offsets[2])
    assert pool.allocate(4096) == offsets[2]


def test_buffer_last_released_is_used_first():
    pool = BufferPool(1 << 20)
    first, second = pool.allocate(5000), pool.allocate(5000)
    pool.release(second)
    pool.release(first)
    assert [pool.allocate(5000), pool.allocate(5000)] == [first, second]


def test_set_aside_is_counted_and_gone():
    pool = BufferPool(MIN_BUFFER_BYTES)
    pool.set_aside(pool.allocate(1))
    assert pool.num_bytes_set_aside == MIN_BUFFER_BYTES
    with pytest.raises(ChannelFull, match="4096 of them set aside"):
        pool.allocate(1)


@pytest.mark.parametrize("num_bytes", [0, 2048, 5000, 3 * 4096])
def test_size_must_be_a_power_of_two(num_bytes):
    with pytest.raises(ValueError, match="power of two"):
        BufferPool(num_bytes)
