import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.guard import redis_counts
from cluster.guard.counts import Demand, LocalCounts, Use
from cluster.guard.errors import TooManyRequests
from cluster.guard.guard import Guard
from cluster.guard.key_source import KeySource
from cluster.guard.keys import KeyLimits, new_key
from cluster.guard.redis_counts import RedisCounts
from cluster.guard.shared_counts import SharedCounts
from cluster.guard.windows import WINDOW_S, slot_of, wait_s
from tests.cluster_unit.redis_server import BINARY, RedisServer

needs_redis = pytest.mark.skipif(BINARY is None, reason="no redis-server on this machine: apt-get install redis-server")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


TIMES = st.floats(0, 400, allow_nan=False)


@given(st.lists(st.tuples(TIMES, st.integers(1, 4)), max_size=60), st.integers(1, 8))
def test_no_minute_ever_has_more_than_the_limit(demands, limit):
    slots, taken = {}, []
    for now_s, num in sorted(demands):
        wait = wait_s(slots, now_s, num, limit)
        if wait == 0:
            taken.append((now_s, num))
            slots[slot_of(now_s)] = slots.get(slot_of(now_s), 0) + num
        elif wait < math.inf:
            assert wait_s(slots, now_s + wait, num, limit) == 0, "who comes back when told is served"
            assert wait <= WINDOW_S + 5
        else:
            assert num > limit
    for start, _ in taken:
        assert sum(num for at, num in taken if start <= at <= start + WINDOW_S) <= limit


LIMITS = KeyLimits(requests_per_minute=3, tokens_per_minute=10, concurrent_streams=2)


@needs_redis
async def test_redis_counts_as_each_gateway_does(redis_url):
    """The same random story to both; the lease of streams, which only Redis has, is kept out by telling of all that are open."""
    import random

    for seed in range(40):
        draw = random.Random(seed)
        shared, local = RedisCounts(redis_url, "same", str(seed), clock_s=0.0), LocalCounts()
        now_s, streams = 1e9, set()
        for _ in range(30):
            now_s += draw.uniform(0, 9)
            shared.clock_s = now_s
            still = [Use("k", stream, 0, is_open=True) for stream in streams]
            await shared.tell(still)
            if draw.random() < 0.7:
                stream = draw.choice(["a", "b", "c", None])
                demand = Demand("k", LIMITS, draw.randint(0, 1), draw.randint(0, 11), None if stream in streams else stream)
                mine, theirs = await local.take(demand, now_s), await shared.take(demand)
                assert (mine is None) == (theirs is None), (seed, now_s, demand, mine, theirs)
                if mine is not None:
                    assert mine.limit == theirs.limit
                    assert (mine.retry_after_s is None) == (theirs.retry_after_s is None)
                    assert mine.retry_after_s is None or mine.retry_after_s == pytest.approx(theirs.retry_after_s, abs=1e-3)
                elif demand.stream_id:
                    streams.add(demand.stream_id)
            elif streams:
                use = Use("k", draw.choice(sorted(streams)), draw.randint(0, 4), is_open=draw.random() < 0.5)
                await local.tell([use], now_s)
                await shared.tell([use])
                if not use.is_open:
                    streams.discard(use.stream_id)
        await shared.close()


@needs_redis
async def test_the_streams_of_a_gateway_that_died_count_no_longer_than_their_lease(redis_url):
    dead, living = (RedisCounts(redis_url, "lease", "c", clock_s=100.0) for _ in range(2))
    for stream in "ab":
        assert await dead.take(Demand("k", LIMITS, stream_id=stream)) is None
    assert (await living.take(Demand("k", LIMITS, stream_id="c"))).limit == "concurrent_streams"
    living.clock_s = 100.0 + redis_counts.STREAM_LEASE_S - 0.1
    assert await living.take(Demand("k", LIMITS, stream_id="c")) is not None
    living.clock_s = 100.0 + redis_counts.STREAM_LEASE_S + 0.1
    assert await living.take(Demand("k", LIMITS, stream_id="c")) is None
    assert await living._redis.ttl(living._key("k", "streams")) > 0, "nothing stays in Redis for ever"
    assert await living.take(Demand("k", LIMITS, num_requests=1, num_tokens=1)) is None
    assert all([await living._redis.ttl(living._key("k", name)) > 0 for name in ("requests", "tokens")])
    await dead.close()
    await living.close()


def guards(redis_url, entry, number=2):
    return [Guard(KeySource([entry]), SharedCounts(redis_url, "app", "cluster")) for _ in range(number)]


@needs_redis
@pytest.mark.parametrize(
    ("limits", "each"),
    [
        ({"requests_per_minute": 10}, "requests per minute"),
        ({"tokens_per_minute": 50}, "tokens per minute"),
        ({"concurrent_streams": 10}, "concurrent streams"),
    ],
)
async def test_two_gateways_share_a_keys_limits(redis_url, limits, each):
    """Thirty calls of five tokens each, at once and over both: ten of them are served, whichever gateway they meet."""
    text, entry = new_key("k-" + each.replace(" ", "-"), ("inference",), KeyLimits(**limits))
    both = guards(redis_url, entry)

    async def call(index):
        grant = await both[index % 2].admit(f"Bearer {text}", "inference")
        return await grant.open_stream(5)

    outcomes = await asyncio.gather(*(call(index) for index in range(30)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, TooManyRequests)]
    served = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert (len(served), len(refused)) == (10, 20)
    assert all(each in str(error) and int(error.headers["retry-after"]) >= 1 for error in refused)
    if "concurrent_streams" in limits:
        served[0].end()
        await both[0].tell(0.0)
        (await (await both[1].admit(f"Bearer {text}", "inference")).open_stream(5)).end()
    for guard in both:
        await guard.close()


@needs_redis
async def test_generated_tokens_of_one_gateway_are_known_to_the_other(redis_url):
    text, entry = new_key("generated", ("inference",), KeyLimits(tokens_per_minute=20))
    both = guards(redis_url, entry)
    grants = [await guard.admit(f"Bearer {text}", "inference") for guard in both]
    stream = await grants[0].open_stream(5)
    stream.count(30)
    await both[0].tell(1e9)
    with pytest.raises(TooManyRequests, match="20 tokens per minute"):
        await grants[1].open_stream(1)
    for guard in both:
        await guard.close()


@needs_redis
async def test_redis_away_stops_nobody_and_is_said(tmp_path, caplog):
    text, entry = new_key("away", ("inference",), KeyLimits(requests_per_minute=4, concurrent_streams=3))
    server = RedisServer(tmp_path).start()
    now_s = [1000.0]
    counts = SharedCounts(server.url, "app", "c")
    guard = Guard(KeySource([entry]), counts, clock=lambda: now_s[0])
    try:
        streams = [await (await guard.admit(f"Bearer {text}", "inference")).open_stream(1) for _ in range(2)]
        assert counts.is_shared
        server.stop()
        streams.append(await (await guard.admit(f"Bearer {text}", "inference")).open_stream(1))
        assert not counts.is_shared
        assert "each gateway for itself" in counts.name
        assert "is away" in caplog.text
        grant = await guard.admit(f"Bearer {text}", "inference")
        with pytest.raises(TooManyRequests, match="3 concurrent streams"):
            await grant.open_stream(1)
        with pytest.raises(TooManyRequests, match="4 requests per minute"):
            await guard.admit(f"Bearer {text}", "inference")
        server.start()
        now_s[0] += 6.0  # past the time when Redis is asked again, and streams are told of
        await guard.tell(now_s[0])
        assert counts.is_shared
        assert "is back" in caplog.text
        other = Guard(KeySource([entry]), SharedCounts(server.url, "app", "c"))
        grant = await other.admit(f"Bearer {text}", "inference")
        with pytest.raises(TooManyRequests, match="3 concurrent streams"):
            await grant.open_stream(1)
        await other.close()
    finally:
        await guard.close()
        server.stop()
