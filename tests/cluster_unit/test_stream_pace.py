"""Streams that rest between two items: for how long, and what becomes of items, failures and closing."""

import asyncio
from contextlib import aclosing

import pytest

from cluster.api import stream_pace
from cluster.api.stream_pace import MAX_REST_S, StreamPace


@pytest.fixture
def rests(monkeypatch):
    """Seconds slept, without sleeping."""
    slept = []
    real_sleep = asyncio.sleep

    async def sleep(delay_s):
        slept.append(delay_s)
        await real_sleep(0)

    monkeypatch.setattr(stream_pace.asyncio, "sleep", sleep)
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
    pace = StreamPace(max_items_per_s=25.0)
    others = [pace.open() for _ in range(4)]
    for other in others:
        await other.rest()
    assert rests == [1 / 25, 2 / 25, 3 / 25, 4 / 25]
    assert [item async for item in pace.keep(Items(1, 2, 3)())] == [1, 2, 3]
    assert rests[4:] == [5 / 25] * 3
    for other in others:
        other.end()
    assert pace.rest_s == 0.0


async def test_a_stream_that_has_said_nothing_keeps_nobody(rests):
    pace = StreamPace()
    silent = [pace.open() for _ in range(100)]
    assert pace.rest_s == 0.0
    for stream in silent:
        stream.end()
    assert pace.rest_s == 0.0


async def test_nobody_rests_for_long(rests):
    pace = StreamPace(max_items_per_s=1.0)
    await pace.open().rest()
    assert rests == [MAX_REST_S]


async def test_failures_come_through_and_closing_closes():
    pace = StreamPace()
    with pytest.raises(ValueError, match="it broke"):
        _ = [item async for item in pace.keep(Items(1, ValueError("it broke"))())]
    items = Items(1, 2)
    async with aclosing(pace.keep(items())) as kept:
        await anext(kept)
    assert items.is_closed
    assert pace.rest_s == 0.0
