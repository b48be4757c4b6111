"""The state store: in memory, and against a real redis-server, with password, with TLS, away and back."""

import json
import time

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from cluster.desired_placement import StoredHost
from cluster.state_store import MemoryStore, RedisStore, StoredState, StoreOutranked, StoreUnavailable
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, MapVersion
from tests.cluster_unit.redis_server import BINARY, RedisServer

needs_redis = pytest.mark.skipif(BINARY is None, reason="no redis-server on this machine (Debian's package redis-server has it)")

numbers = st.integers(0, 2**53)
experts = st.builds(LogicalExpert, st.integers(0, 99), st.integers(0, 999))
keys = st.builds(HostKey, st.text(max_size=20), st.integers(0, 2**62))
states = st.builds(
    StoredState,
    version=st.builds(MapVersion, numbers, numbers),
    hosts=st.lists(st.builds(StoredHost, keys, st.text(max_size=8), st.frozensets(experts, max_size=8)), max_size=4).map(tuple),
    loads=st.dictionaries(experts, st.integers(0, 9999).map(float), max_size=8),
    scaling=st.dictionaries(st.text(max_size=8), st.dictionaries(st.text(max_size=8), st.floats(0, 100), max_size=2), max_size=2),
    draining=st.lists(keys, max_size=2).map(tuple),
    decisions=st.lists(st.fixed_dictionaries({"n": numbers, "kind": st.text(max_size=5), "text": st.text()}), max_size=3).map(tuple),
    saved_unix_s=st.floats(0, 2e9),
)


def state(epoch, n=1, **fields):
    held = frozenset({LogicalExpert(1, 2), LogicalExpert(3, 4)})
    return StoredState(MapVersion(epoch, n), (StoredHost(HostKey("a", 7), "node", held),), **fields)


@pytest.fixture
def server(tmp_path):
    with RedisServer(tmp_path) as running:
        yield running


@pytest.fixture
def store(server):
    store = RedisStore(server.url, "app", "blue")
    yield store
    store.close()


@given(states)
def test_what_is_written_is_read(written):
    assert StoredState.from_json(written.to_json()) == written


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '{"format": 2}', json.dumps(json.loads(state(1).to_json()) | {"version": [1]}), "[" * 100_000]
    + [json.dumps(json.loads(state(1).to_json()) | {key: 5}) for key in ("version", "hosts", "loads", "scaling", "draining", "decisions")],
)
def test_what_cannot_be_read_is_said(text):
    with pytest.raises(StoreUnavailable, match="cannot be read") as raised:
        StoredState.from_json(text)
    assert raised.value.is_unreadable


def test_memory():
    store = MemoryStore()
    assert store.read() is None
    store.write(state(2))
    assert store.read() == state(2)
    with pytest.raises(StoreOutranked):
        store.write(state(1))
    assert store.read() == state(2)


@needs_redis
def test_redis_keeps_the_last_state_of_the_highest_epoch(store, server):
    assert store.read() is None
    now_ms = 1_767_225_600_123  # epochs are of this size: they must come back to the digit
    store.write(state(now_ms, 5))
    store.write(state(now_ms, 6))
    again = RedisStore(server.url, "app", "blue")
    assert again.read() == state(now_ms, 6)
    with pytest.raises(StoreOutranked) as raised:
        store.write(state(now_ms - 1, 9))
    assert raised.value.epoch == now_ms
    assert again.read() == state(now_ms, 6)
    again.write(state(now_ms + 1, 1))
    assert store.read() == state(now_ms + 1, 1)
    again.close()


@needs_redis
def test_applications_and_clusters_never_share(store, server):
    store.write(state(5))
    others = [RedisStore(server.url, application, cluster) for application, cluster in (("app", "green"), ("other", "blue"))]
    assert [other.read() for other in others] == [None, None]
    assert len({store.key, *(other.key for other in others)}) == 3
    for other in others:
        other.close()


@needs_redis
def test_what_somebody_else_wrote_is_said(store, server):
    with redis.Redis.from_url(server.url) as client:
        client.hset(store.key, "state", "nonsense")
        with pytest.raises(StoreUnavailable, match="cannot be read"):
            store.read()
        client.set(store.key + "x", "a string where a hash belongs")
    wrong = RedisStore(server.url, "app", "blue")
    wrong.key = store.key + "x"
    for call in (wrong.read, lambda: wrong.write(state(1))):
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            call()
    wrong.close()


@needs_redis
def test_away_and_back(tmp_path):
    server = RedisServer(tmp_path)
    store = RedisStore(server.url, "app", "blue")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        store.read()
    with server:
        store.write(state(3))
        assert store.read() == state(3)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.write(state(4))
    assert time.monotonic() - started < 3.0
    with server:
        assert store.read() is None, "this one kept nothing on disk"
        store.write(state(4))
        assert store.read() == state(4)
    store.close()


@needs_redis
def test_a_frozen_redis_is_given_up_in_time(store, server):
    store.write(state(3))
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLIENT", "PAUSE", "60000", "ALL")
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="TimeoutError"):
        store.read()
    assert time.monotonic() - started < 4.0


@needs_redis
def test_a_password(tmp_path):
    with RedisServer(tmp_path, password="correct-horse") as server:
        store = RedisStore(server.url, "app", "blue")
        store.write(state(3))
        assert store.read() == state(3)
        assert "correct-horse" not in store.name
        for wrong in (server.url.replace("correct-horse", "battery-staple"), server.url.replace(":correct-horse@", "")):
            refused = RedisStore(wrong, "app", "blue")
            with pytest.raises(StoreUnavailable, match=r"Authentication") as raised:
                refused.read()
            assert "horse" not in str(raised.value)
            assert "battery" not in str(raised.value)
            refused.close()
        store.close()


@needs_redis
def test_tls_with_a_password(tmp_path):
    with RedisServer(tmp_path, password="correct-horse", tls=True) as server:
        store = RedisStore(server.url, "app", "blue")
        store.write(state(3))
        assert store.read() == state(3)
        store.close()
        without_authority = RedisStore(server.url.partition("?")[0], "app", "blue")
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            without_authority.read()
        plain = RedisStore(server.url.partition("?")[0].replace("rediss", "redis"), "app", "blue")
        with pytest.raises(StoreUnavailable):
            plain.read()
        without_authority.close()
        plain.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379", "redis://127.0.0.1:port/"])
def test_no_redis_url(url):
    with pytest.raises(StoreUnavailable, match="redis_url"):
        RedisStore(url, "app", "blue")
