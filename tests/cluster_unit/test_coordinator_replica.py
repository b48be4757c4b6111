"""The Coordinator's replica on an event loop, without Serve: held answers, closing, and a real Redis that goes and comes."""

import asyncio
import sys
from collections.abc import Callable

import pytest

from cluster.config import StateStoreSettings
from cluster.coordinator import Outranked
from cluster.coordinator_limits import CoordinatorLimits
from cluster.coordinator_replica import CoordinatorReplica, CoordinatorSetup
from model.logical_expert import LogicalExpert
from tests.cluster_unit.made_up_members import Host, Router
from tests.cluster_unit.redis_server import BINARY, RedisServer

EXPERTS = [LogicalExpert(1, expert) for expert in range(8)]
WAIT_S = 10.0
needs_redis = pytest.mark.skipif(BINARY is None, reason="no redis-server on this machine (Debian's package redis-server has it)")


def replica(redis_url: str | None = None, hold_s: float = 0.0, num_hosts: int = 2) -> CoordinatorReplica:
    store = StateStoreSettings(redis_url=redis_url, cluster="blue")
    return CoordinatorReplica(CoordinatorSetup("app", EXPERTS, CoordinatorLimits(num_hosts, 1, lease_s=60.0), store, hold_s))


async def exchange(coordinator, member):
    if isinstance(member, Router):
        member.duties.obey(await coordinator.exchange_router(member.make_report()))
        member.adopt()
    else:
        member.obey(await coordinator.exchange_host(member.make_report()))


async def started(coordinator, names="ab"):
    members = [*map(Host, names), Router()]
    for _ in range(6):
        for member in members:
            async with asyncio.timeout(WAIT_S):
                await exchange(coordinator, member)
    assert (await coordinator.view())["placement"]["version"]
    return members


async def until(is_so: Callable[[dict], bool], coordinator):
    async with asyncio.timeout(WAIT_S):
        while not is_so(view := await coordinator.view()):  # noqa: ASYNC110 - people poll it too
            await asyncio.sleep(0.02)
    return view


async def test_news_reach_a_host_at_rest_at_once():
    coordinator = replica()
    a, b, _router = await started(coordinator)
    coordinator._setup = CoordinatorSetup("app", EXPERTS, coordinator._setup.limits, coordinator._setup.state_store, hold_s=600.0)
    held = asyncio.create_task(exchange(coordinator, b))
    await asyncio.sleep(0)
    assert not held.done()
    operation = await coordinator.drain("a")
    async with asyncio.timeout(WAIT_S):
        await held
    assert b.ready == frozenset(EXPERTS)
    assert (await coordinator.operation(operation["id"]))["state"] == "running"
    assert a.ready


async def test_an_answer_is_held_no_longer_than_said():
    coordinator = replica(hold_s=0.05)
    async with asyncio.timeout(WAIT_S):
        a, *_ = await started(coordinator)
        await exchange(coordinator, a)


async def test_closing_is_told_before_it_answers():
    coordinator = replica()
    a, b, _router = await started(coordinator)
    coordinator._setup = CoordinatorSetup("app", EXPERTS, coordinator._setup.limits, coordinator._setup.state_store, hold_s=600.0)
    held = [asyncio.create_task(exchange(coordinator, host)) for host in (a, b)]
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await coordinator.announce_closing()
        await asyncio.gather(*held)
    assert a.duties.may_leave
    assert b.duties.may_leave


async def test_a_coordinator_that_is_outranked_is_not_healthy():
    coordinator = replica()
    a, *_ = await started(coordinator)
    coordinator.check_health()
    a.duties.epoch_seen += 10**9
    with pytest.raises(Outranked):
        await exchange(coordinator, a)
    with pytest.raises(Outranked):
        coordinator.check_health()


@needs_redis
async def test_redis_away_stops_nothing_and_everything_but_redis_may_be_killed(tmp_path):
    with RedisServer(tmp_path, password="correct-horse") as server:
        first = replica(server.url)
        a, b, _router = await started(first)
        placement = {a.ready, b.ready}
        view = await until(lambda view: view["state_store"]["saved_unix_s"], first)
        version = view["placement"]["version"]
        assert "horse" not in str(view)
        second = replica(server.url)
        assert any("remembers map" in line["text"] for line in (await second.view())["decisions"])
        c, d, router = await started(second, "cd")
        assert {c.ready, d.ready} == placement
        assert (await second.view())["placement"]["version"] > version
        server.stop()
        await second.drain("c")
        view = await until(lambda view: not view["state_store"]["is_available"], second)
        assert "does not answer" in view["state_store"]["error"]
        for _ in range(4):
            for member in (c, d, router):
                await exchange(second, member)
        assert d.ready == frozenset(EXPERTS), "placement goes on"
        server.start()
        view = await until(lambda view: view["state_store"]["is_available"], second)
        assert any(event["text"].endswith("is back") for event in view["events"])


@needs_redis
async def test_a_store_that_was_away_at_the_start_is_read_when_it_is_back(tmp_path):
    server = RedisServer(tmp_path)
    with server:
        first = replica(server.url)
        members = await started(first)
        await until(lambda view: view["state_store"]["saved_unix_s"], first)
        for task in (first._ticking, first._saving):
            task.cancel()
        dump = first._store.read()
    second = replica(server.url)
    assert not (await second.view())["state_store"]["is_available"]
    with server:
        second._store.write(dump)
        view = await until(lambda view: view["state_store"]["is_available"], second)
        assert any("remembers map" in line["text"] for line in view["decisions"])
    assert members


def test_the_control_loop_needs_no_torch():
    import subprocess

    code = "import sys, cluster.coordinator_replica; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
