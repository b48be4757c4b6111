"""Failover, back-off and choice, against routers that are scripts; one against a real listener."""

import asyncio
from contextlib import aclosing

import pytest

from actors.exchange import RouterEntry
from cluster import router_pool
from cluster.errors import NoRouter
from cluster.router_pool import MAX_RESUBMISSIONS, RouterPool
from router import wire
from router.errors import ChannelClosed, FrameError
from router.placement_map import Endpoint, HostKey
from router.request import Delta, Request, SamplingParams
from router.transport.listener import Listener
from router.transport.messages import MessageClient, decode_message, encode_message


class Client:
    """The pool's end of a channel to a scripted router."""

    def __init__(self, router):
        self.router = router
        self.incoming = asyncio.Queue()
        self.is_closed = False
        self.closes_slowly = asyncio.Event()
        self.closes_slowly.set()

    async def send(self, message):
        await asyncio.sleep(0)
        if self.router.refuses is not None:
            raise self.router.refuses
        message = decode_message(encode_message(1, message)[1])
        self.router.received.append(message)
        if "submit" in message:
            self.router.on_submit(self, Request.model_validate(message["submit"]))

    def __aiter__(self):
        return self

    async def __anext__(self):
        message = await self.incoming.get()
        if message is None:
            raise StopAsyncIteration
        return message

    async def close(self):
        await self.closes_slowly.wait()
        self.is_closed = True

    def say(self, *deltas):
        self.incoming.put_nowait(decode_message(encode_message(1, wire.deltas_to_wire(list(deltas)))[1]))

    def die(self):
        self.incoming.put_nowait(None)


class Router:
    """Answers a request by `on_submit(client, request)`."""

    def __init__(self, name, on_submit):
        self.key = HostKey(name, 1)
        self.entry = RouterEntry(self.key, Endpoint(name, name, "127.0.0.1", 1), {})
        self.on_submit = on_submit
        self.refuses = None
        self.received = []
        self.clients = []
        self.num_tries = 0
        self.answers = True

    async def connect(self):
        self.num_tries += 1
        if self.answers is None:
            await asyncio.Event().wait()
        if not self.answers:
            raise ChannelClosed("cannot reach it")
        self.clients.append(Client(self))
        return self.clients[-1]

    @property
    def submitted(self):
        return [Request.model_validate(message["submit"]) for message in self.received if "submit" in message]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(router_pool, "FIRST_BACKOFF_S", 0.01)


@pytest.fixture
async def make_pool():
    pools = []

    def make(*routers, wait_s=10.0):
        registry = list(routers)
        by_node = {router.entry.endpoint: router for router in routers}

        async def connect(endpoint):
            return await by_node[endpoint].connect()

        pool = RouterPool(connect, lambda: tuple(router.entry for router in registry), wait_s)
        pools.append(pool)
        return pool, registry

    yield make
    for pool in pools:
        pool.close()
    await asyncio.sleep(0)


def make_request(name="r", deadline_s=None, **sampling):
    sampling = SamplingParams(**{"max_tokens": 8, **sampling})
    return Request(request_id=name, prompt_token_ids=(1, 2), sampling=sampling, deadline_s=deadline_s)


async def deltas_of(pool, request):
    """What the pool tells, as an iterator; closing it cancels the request."""
    told = asyncio.Queue()
    task = asyncio.create_task(pool.generate(request, told.put_nowait))
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (delta := await told.get()) is not None:
            yield delta
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def tokens_of(pool, request):
    async with asyncio.timeout(20):
        return [token async for delta in deltas_of(pool, request) for token in delta.token_ids]


def finishes(client, request):
    said = len(request.generated_token_ids)
    client.say(*(Delta(request.request_id, (n,)) for n in range(said, 3)), Delta(request.request_id, (3,), finish="length"))


def dies_after_two(client, request):
    client.say(Delta(request.request_id, (0,)), Delta(request.request_id, (1,)))
    client.die()


def dies(client, request):
    client.die()


def says_nothing(client, request):
    pass


async def last(deltas):
    return [delta async for delta in deltas][-1]


async def until(condition):
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def linked(pool, *routers):
    """All routers have their channel."""
    pool._tend({router.key: router.entry for router in routers})
    await until(lambda: len(pool._links) == len(routers))


async def test_end_of_stream_sends_the_request_on_with_what_was_said(make_pool):
    first, second = Router("a", dies_after_two), Router("b", finishes)
    pool, _ = make_pool(first, second)
    await linked(pool, first, second)
    second.entry.stats["num_waiting"] = 1.0  # so that the first is chosen
    assert await tokens_of(pool, make_request(deadline_s=100.0)) == [0, 1, 2, 3]
    assert len(first.submitted) == 1
    assert second.submitted[0].generated_token_ids == (0, 1)
    assert 0 < second.submitted[0].deadline_s < 100.0


async def test_dying_router_is_not_chosen_again_while_its_channel_closes(make_pool):
    def dies_slowly(client, request):
        client.closes_slowly.clear()
        dies_after_two(client, request)

    first, second = Router("a", dies_slowly), Router("b", finishes)
    pool, _ = make_pool(first, second)
    await linked(pool, first, second)
    second.entry.stats["num_waiting"] = 1.0
    assert await tokens_of(pool, make_request()) == [0, 1, 2, 3]
    assert (len(first.submitted), first.num_tries) == (1, 1)


async def test_submit_that_never_left_is_no_resubmission(make_pool):
    broken = [Router(name, finishes) for name in "abcd"]
    for router in broken:
        router.refuses = ChannelClosed("the channel to the router is closed")
    good = Router("e", finishes)
    pool, _ = make_pool(*broken, good)
    await linked(pool, *broken, good)
    good.entry.stats["num_waiting"] = 1.0
    assert len(broken) > MAX_RESUBMISSIONS + 1
    assert await tokens_of(pool, make_request()) == [0, 1, 2, 3]


async def test_routers_that_never_take_it_are_given_up_in_time(make_pool):
    router = Router("a", finishes)
    router.refuses = ChannelClosed("the channel to the router is closed")
    pool, _ = make_pool(router, wait_s=0.2)
    with pytest.raises(NoRouter):
        await tokens_of(pool, make_request())


async def test_request_that_kills_routers_kills_no_more_than_two(make_pool):
    routers = [Router(name, dies) for name in "abc"]
    pool, _ = make_pool(*routers)
    await linked(pool, *routers)
    with pytest.raises(NoRouter, match="died"):
        await tokens_of(pool, make_request())
    assert sum(len(router.submitted) for router in routers) == 1 + MAX_RESUBMISSIONS


async def test_only_router_dies_and_a_new_one_comes(make_pool):
    old, new = Router("a", dies_after_two), Router("b", finishes)
    pool, registry = make_pool(old, new)
    registry.remove(new)
    async with aclosing(deltas_of(pool, make_request())) as deltas:
        assert (await anext(deltas)).token_ids == (0,)
        assert (await anext(deltas)).token_ids == (1,)
        registry[:] = []
        rest = asyncio.create_task(anext(deltas))
        done, _ = await asyncio.wait([rest], timeout=0.1)
        assert not done
        registry.append(new)
        async with asyncio.timeout(20):
            assert (await rest).token_ids == (2,)
    assert new.submitted[0].generated_token_ids == (0, 1)


async def test_only_router_dies_and_none_comes(make_pool):
    router = Router("a", dies_after_two)
    pool, registry = make_pool(router, wait_s=0.2)
    deltas = deltas_of(pool, make_request())
    await anext(deltas)
    registry.clear()
    with pytest.raises(NoRouter, match="no router could take"):
        await asyncio.wait_for(last(deltas), 20)


async def test_unreachable_and_silent_routers_delay_nobody_and_are_named_once(make_pool, caplog):
    good, down, silent = Router("a", finishes), Router("down", finishes), Router("silent", finishes)
    down.answers, silent.answers = False, None
    pool, _ = make_pool(good, down, silent)
    async with asyncio.timeout(5):
        for n in range(20):
            assert await tokens_of(pool, make_request(f"r{n}")) == [0, 1, 2, 3]
        await until(lambda: down.num_tries >= 4)
    assert silent.num_tries == 1
    assert caplog.text.count("down is out of reach") == 1
    down.answers = True
    await until(lambda: down.clients)


async def test_attempts_grow_rarer(make_pool, monkeypatch):
    monkeypatch.setattr(router_pool, "FIRST_BACKOFF_S", 0.011)
    monkeypatch.setattr(router_pool, "MAX_BACKOFF_S", 0.04)
    slept = []
    real_sleep = asyncio.sleep

    async def sleep(delay_s):
        slept.append(delay_s)
        await real_sleep(0)

    down = Router("down", finishes)
    down.answers = False
    pool, _ = make_pool(down, wait_s=0.05)
    monkeypatch.setattr(router_pool.asyncio, "sleep", sleep)
    with pytest.raises(NoRouter):
        await tokens_of(pool, make_request())
    assert [delay_s for delay_s in slept if delay_s != router_pool._POLL_S][:4] == [0.011, 0.022, 0.04, 0.04]


async def test_channel_of_a_router_that_left_closes_with_its_last_request(make_pool):
    leaving, staying = Router("a", says_nothing), Router("b", finishes)
    pool, registry = make_pool(leaving, staying)
    await linked(pool, leaving, staying)
    staying.entry.stats["num_waiting"] = 1.0
    async with aclosing(deltas_of(pool, make_request("long"))) as deltas:
        waiting = asyncio.create_task(anext(deltas))
        await until(lambda: leaving.submitted)
        registry.remove(leaving)
        await tokens_of(pool, make_request("other"))
        assert not leaving.clients[0].is_closed
        leaving.clients[0].say(Delta("long", (9,), finish="stop"))
        assert (await waiting).token_ids == (9,)
    await tokens_of(pool, make_request("next"))
    await until(lambda: leaving.clients[0].is_closed)
    assert leaving.num_tries == 1


async def test_cancelling_cancels_at_the_router(make_pool):
    router = Router("a", lambda client, request: client.say(Delta(request.request_id, (0,))))
    pool, _ = make_pool(router)
    deltas = deltas_of(pool, make_request())
    await anext(deltas)
    await deltas.aclose()
    assert router.received[-1] == {"cancel": "r"}


async def test_request_that_cannot_travel_fails_alone_and_the_channel_goes_on(make_pool):
    router = Router("a", finishes)
    pool, _ = make_pool(router)
    router.refuses = FrameError("the message cannot be packed")
    (delta,) = [delta async for delta in deltas_of(pool, make_request())]
    assert (delta.finish, delta.failure.kind) == ("error", "invalid_request")
    router.refuses = None
    assert await tokens_of(pool, make_request()) == [0, 1, 2, 3]
    assert router.num_tries == 1


async def test_nothing_is_told_twice_where_a_broken_channel_still_brings_deltas(make_pool):
    first, second = Router("a", lambda client, request: client.say(Delta(request.request_id, (0,)))), Router("b", finishes)
    pool, _ = make_pool(first, second)
    await linked(pool, first, second)
    second.entry.stats["num_waiting"] = 1.0
    async with aclosing(deltas_of(pool, make_request())) as deltas:
        assert (await anext(deltas)).token_ids == (0,)
        pool._links[first.key].give_up()  # as a request does that cannot be sent any more, while messages are still to be read
        first.clients[0].say(*(Delta("r", (n,)) for n in (1, 2)), Delta("r", (3,), finish="length"))
        assert [token async for delta in deltas for token in delta.token_ids] == [1, 2, 3]
    assert second.submitted[0].generated_token_ids == (0,)


@pytest.mark.parametrize("is_finished", [False, True])
async def test_a_router_that_has_the_request_though_sending_it_failed_is_believed(make_pool, is_finished):
    """The request's bytes have left, those of others are in the way, and the channel breaks: its answer has come before."""

    class Breaking(Client):
        async def send(self, message):
            await super().send(message)
            await until(lambda: not self.incoming.qsize())
            await asyncio.sleep(0)
            raise ChannelClosed("the router has closed the channel")

    async def connect():
        first.clients.append(Breaking(first))
        return first.clients[-1]

    def answers(client, request):
        client.say(Delta(request.request_id, (0,)), Delta(request.request_id, (1,), finish="length" if is_finished else None))

    first, second = Router("a", answers), Router("b", finishes)
    first.connect = connect
    pool, _ = make_pool(first, second)
    await linked(pool, first, second)
    second.entry.stats["num_waiting"] = 1.0
    assert await tokens_of(pool, make_request()) == ([0, 1] if is_finished else [0, 1, 2, 3])
    assert [request.generated_token_ids for request in second.submitted] == ([] if is_finished else [(0, 1)])


async def test_close_ends_channels(make_pool):
    router, down = Router("a", finishes), Router("down", finishes)
    down.answers = False
    pool, _ = make_pool(router, down)
    await tokens_of(pool, make_request())
    keepers = list(pool._keepers.values())
    pool.close()
    async with asyncio.timeout(5):
        await asyncio.wait(keepers)
    assert router.clients[0].is_closed


async def test_failover_between_real_listeners():
    def dying(connection, message):
        if "submit" in message:
            connection.send(wire.deltas_to_wire([Delta("r", (0,))]))
            connection.hang_up()

    def finishing(connection, message):
        if "submit" in message:
            said = tuple(message["submit"]["generated_token_ids"])
            connection.send(wire.deltas_to_wire([Delta("r", (len(said),), finish="stop")]))

    listeners = [Listener(b"secret", "app", "node-1", on_message=take) for take in (dying, finishing)]
    busy = ({}, {"num_waiting": 1.0})
    entries = tuple(RouterEntry(HostKey(f"router-{n}", 1), listener.endpoint, busy[n]) for n, listener in enumerate(listeners))

    async def connect(endpoint):
        return await MessageClient.connect(endpoint, "node-1", b"secret", "app")

    pool = RouterPool(connect, lambda: entries)
    try:
        pool._tend({entry.key: entry for entry in entries})
        await until(lambda: len(pool._links) == len(entries))
        assert await tokens_of(pool, make_request()) == [0, 1]
    finally:
        keepers = list(pool._keepers.values())
        pool.close()
        await asyncio.wait(keepers)
        for listener in listeners:
            listener.close()
