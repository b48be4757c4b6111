"""Deltas of several requests as one stream: order, how many at a time, failures, and requests that are closed."""

import asyncio

import pytest

from cluster.api.fan import Fan
from router.request import Delta, Request, SamplingParams


def request(name):
    return Request(request_id=name, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1000))


class Told:
    """Requests whose deltas a test tells by hand."""

    def __init__(self):
        self.on_delta, self.ends, self.cancelled = {}, {}, []
        self.slow_to_cancel = asyncio.Event()
        self.slow_to_cancel.set()

    async def generate(self, request, on_delta):
        name = request.request_id
        self.on_delta[name] = on_delta
        self.ends[name] = asyncio.get_running_loop().create_future()
        try:
            await self.ends[name]
        except asyncio.CancelledError:
            await self.slow_to_cancel.wait()
            self.cancelled.append(name)
            raise

    def say(self, name, *token_ids, finish=None):
        for position, token_id in enumerate(token_ids):
            is_last = position == len(token_ids) - 1
            self.on_delta[name](Delta(name, (token_id,), finish=finish if is_last else None))
        if finish is not None:
            self.ends[name].set_result(None)


async def opened(*names):
    told = Told()
    fan = Fan(told, [request(name) for name in names])
    await asyncio.sleep(0)
    return told, fan


def tokens(deltas):
    return [(index, *delta.token_ids) for index, delta, _ in deltas]


async def test_all_that_is_ready_comes_at_a_time_in_order():
    told, fan = await opened("a", "b")
    told.say("a", 1, 2)
    told.say("b", 3)
    told.say("a", 4, finish="stop")
    assert tokens(await fan.next()) == [(0, 1), (0, 2), (1, 3), (0, 4)]
    waiting = asyncio.create_task(fan.next())
    await asyncio.sleep(0)
    told.say("b", 5)
    told.say("b", 6)
    assert tokens(await waiting) == [(1, 5), (1, 6)]
    await fan.close()
    assert told.cancelled == ["b"]


async def test_what_a_request_raises_comes_after_its_deltas():
    told, fan = await opened("a", "b")
    told.say("a", 1)
    told.ends["a"].set_exception(ValueError("it broke"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    told.say("b", 2)
    assert tokens(await fan.next()) == [(0, 1)]
    with pytest.raises(ValueError, match="it broke"):
        await fan.next()
    await fan.close()


async def test_a_failure_from_outside_comes_after_what_was_ready_and_before_anything_else():
    told, fan = await opened("a")
    told.say("a", 1)
    fan.fail(TimeoutError("late"))
    told.say("a", 2)
    assert tokens(await fan.next()) == [(0, 1)]
    for _ in range(2):
        with pytest.raises(TimeoutError, match="late"):
            await fan.next()
    await fan.close()


async def test_deltas_have_the_time_at_which_they_came():
    told, fan = await opened("a")
    clock = asyncio.get_running_loop().time
    told.say("a", 1)
    between = clock()
    await asyncio.sleep(0.01)
    told.say("a", 2)
    first, second = (came for _, _, came in await fan.next())
    assert first <= between < second
    await fan.close()


async def test_a_failure_wakes_a_reader():
    _, fan = await opened("a")
    waiting = asyncio.create_task(fan.next())
    await asyncio.sleep(0)
    fan.fail(TimeoutError("late"))
    with pytest.raises(TimeoutError):
        await waiting
    await fan.close()


async def test_a_stopped_request_says_no_more_and_is_cancelled_once():
    told, fan = await opened("a", "b")
    told.slow_to_cancel.clear()
    told.say("a", 1)
    fan.stop(0)
    told.say("b", 2)
    assert tokens(await fan.next()) == [(1, 2)]
    told.say("b", 3, finish="length")
    assert tokens(await fan.next()) == [(1, 3)]
    closing = asyncio.create_task(fan.close())
    await asyncio.sleep(0)
    assert not closing.done()
    told.slow_to_cancel.set()
    await closing
    assert told.cancelled == ["a"]
