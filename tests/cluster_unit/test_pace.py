"""Streams that rest between two items: for how long, and what becomes of items, failures and closing."""

import asyncio
from contextlib import AsyncExitStack, aclosing

import pytest

from cluster.api import pace
from cluster.api.pace import Pace


@pytest.fixture
def rests(monkeypatch):
    """Seconds slept, without sleeping."""
    slept = []
    real_sleep = asyncio.sleep

    async def sleep(delay_s):
        slept.append(delay_s)
        await real_sleep(0)

    monkeypatch.setattr(pace.asyncio, "sleep", sleep)
    return slept


class Items:
    def __init__(self, *items):
        self.items, self.is_closed = items, False

    async def __call__(self):
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


async def test_a_stream_rests_for_its_share_after_each_item(rests):
    keeper = Pace(max_items_per_s=10.0)
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(aclosing(keeper.keep(Items(1, 2)()))) for _ in range(4)]
        for other in others:
            await anext(other)
        assert [item async for item in keeper.keep(Items(1, 2, 3)())] == [1, 2, 3]
    assert len(rests) == 3
    assert all(0.4 < rest_s <= 0.5 for rest_s in rests)
    assert keeper.rest_s == 0.0


async def test_a_stream_that_is_slow_anyway_does_not_rest(rests):
    keeper = Pace(max_items_per_s=1e9)
    assert [item async for item in keeper.keep(Items("a", "b")())] == ["a", "b"]
    assert rests == []


async def test_failures_come_through_and_closing_closes():
    keeper = Pace()
    with pytest.raises(ValueError, match="it broke"):
        _ = [item async for item in keeper.keep(Items(1, ValueError("it broke"))())]
    items = Items(1, 2)
    async with aclosing(keeper.keep(items())) as kept:
        await anext(kept)
    assert items.is_closed
    assert keeper.rest_s == 0.0
