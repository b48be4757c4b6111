"""The Coordinator as a Serve replica, without torch: Serve's event loop is the one thread that calls it; a thread beside it writes."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors.exchange import GatewayReport, HostOrders, HostReport, Registry, RouterOrders, RouterReport
from actors.log_lines import configure_logging
from actors.metrics import Sums
from cluster.config import MetricsSettings, StateStoreSettings
from cluster.coordinator import Coordinator, Outranked
from cluster.coordinator_limits import CoordinatorLimits
from cluster.dashboard.latency import latencies
from cluster.metrics.application_metrics import ApplicationMetrics
from cluster.metrics.exposition import metrics_text
from cluster.placement import prepare
from cluster.ray_cluster import cluster_id
from cluster.scaling_board import BoardReader, RayKeyValues
from cluster.state_store import MemoryStore, RedisStore, StateStore, StoredState, StoreOutranked, StoreUnavailable
from model.logical_expert import LogicalExpert

logger = logging.getLogger("shoal")

TICK_S = 0.25  # leases end and moves go on though nobody calls
STORE_RETRY_S = 1.0
CLOSING_WAIT_S = 1.0
METRICS_AGE_S = 0.5
BOARDS_INTERVAL_S = 2.0
SCALING_ROLES = ("gateway", "router", "expert_host")


@dataclass(frozen=True)
class CoordinatorSetup:
    """Everything the Coordinator needs to know; the application's builder fills it in.

    A host that has nothing to do is answered after `hold_s`, or when there is news: so news reach it at once.
    """

    application: str
    experts: list[LogicalExpert]
    limits: CoordinatorLimits
    state_store: StateStoreSettings
    hold_s: float
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    scales: bool = False  # some role follows its load


class CoordinatorReplica:
    """One Coordinator. Its epoch is the time in milliseconds, above any that no member and no store can tell it of."""

    def __init__(self, setup: CoordinatorSetup) -> None:
        configure_logging("coordinator")
        prepare()  # to compile the planner in the middle of an exchange would outlast every lease
        self._setup = setup
        self._store = _open_store(setup)
        epoch, salt = time.time_ns() // 1_000_000, random.randrange(1000)
        self._coordinator = Coordinator(setup.experts, setup.limits, epoch=epoch, salt=salt)
        self._coordinator.saving.store_name = self._store.name
        self._metrics = ApplicationMetrics(setup.application, setup.limits.lease_s)
        self._boards = BoardReader(setup.application, SCALING_ROLES, RayKeyValues(), time.time())
        self._text: tuple[float, asyncio.Task[bytes]] | None = None
        self._has_read = False
        self._take_up(self._call_store(self._store.read))
        self._news = asyncio.Event()
        self._seen_generation = 0
        self._ticking: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    def check_health(self) -> None:
        """Serve asks this; a Coordinator that has met a higher epoch is not needed any more."""
        if self._coordinator.is_outranked:
            raise Outranked("a coordinator of a higher epoch is in charge: this one ends")

    def __del__(self) -> None:
        if hasattr(self, "_store"):
            self._store.close()

    async def exchange_host(self, report: HostReport) -> HostOrders:
        """See Coordinator.exchange_host. A host at rest is answered when there is news, or after `hold_s`."""
        self._begin()
        self._coordinator.hear_host(report)
        self._metrics.hear(report.key, report.sums)
        self._tell_news()
        until = time.monotonic() + self._setup.hold_s
        while self._coordinator.is_at_rest(report) and (left_s := until - time.monotonic()) > 0:
            if not await self._wait_for_news(left_s):
                break
        orders = self._coordinator.host_orders(report)
        self._tell_news()
        return orders

    async def exchange_router(self, report: RouterReport) -> RouterOrders:
        """See Coordinator.exchange_router."""
        self._begin()
        orders = self._coordinator.exchange_router(report)
        self._metrics.hear(report.key, report.sums)
        self._tell_news()
        return orders

    async def registry(self, report: GatewayReport | None = None) -> Registry:
        """See Coordinator.registry; with what the gateway that asks has counted."""
        self._begin()
        if report is not None:
            self._metrics.hear_gateway(report, time.monotonic())
        return self._coordinator.registry()

    async def metrics(self) -> bytes:
        """The whole application in Prometheus' text format. Made in a thread, and once for all who ask within METRICS_AGE_S."""
        self._begin()
        now_s = time.monotonic()
        if self._text is None or now_s - self._text[0] > METRICS_AGE_S:
            self._coordinator.observe()
            snapshot = self._metrics.snapshot(self._coordinator, now_s)
            making = asyncio.create_task(asyncio.to_thread(metrics_text, snapshot, self._setup.metrics.per_expert))
            self._text = now_s, making
        return await asyncio.shield(self._text[1])

    async def view(self) -> dict[str, Any]:
        """See Coordinator.view; with the latencies that gateways measured."""
        self._begin()
        return self._coordinator.view() | {"latency": latencies(self._metrics.totals)}

    async def rebalance(self) -> dict[str, Any]:
        """See Coordinator.rebalance; the operation as plain values."""
        operation = self._coordinator.rebalance()
        self._tell_news()
        return operation.as_dict()

    async def drain(self, host_id: str) -> dict[str, Any]:
        """See Coordinator.drain."""
        operation = self._coordinator.drain(host_id)
        self._tell_news()
        return operation.as_dict()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """See Coordinator.operation."""
        return self._coordinator.operation(operation_id).as_dict()

    async def set_scaling(self, bounds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """See Coordinator.set_scaling."""
        operation = self._coordinator.set_scaling(bounds)
        self._tell_news()
        return operation.as_dict()

    async def announce_closing(self) -> None:
        """See Coordinator.announce_closing. Answers when every host has been told, or after CLOSING_WAIT_S."""
        self._coordinator.announce_closing()
        self._tell_news()
        until = time.monotonic() + CLOSING_WAIT_S
        while not self._coordinator.has_told_closing and (left_s := until - time.monotonic()) > 0:
            await self._wait_for_news(left_s)

    # -- news, time, and the store

    def _tell_news(self) -> None:
        """Wakes the hosts whose calls are held, if orders may have changed."""
        if self._coordinator.generation != self._seen_generation:
            self._seen_generation = self._coordinator.generation
            self._news.set()
            self._news = asyncio.Event()

    async def _wait_for_news(self, timeout_s: float) -> bool:
        news = self._news
        try:
            async with asyncio.timeout(timeout_s):
                await news.wait()
        except TimeoutError:
            return False
        return True

    def _begin(self) -> None:
        """Serve makes the replica outside of its event loop: the first call starts what runs on it."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
            self._saving = asyncio.create_task(self._save())
            if self._setup.scales:
                self._reading = asyncio.create_task(self._read_boards())

    async def _tick(self) -> None:
        while True:
            try:
                self._coordinator.observe()
                self._tell_news()
            except Exception:
                logger.exception("the coordinator could not look around")
            await asyncio.sleep(TICK_S)

    async def _read_boards(self) -> None:
        """What the autoscaling policies did, which they do elsewhere: as decisions, and as sums."""
        while True:
            for role, board in (await asyncio.to_thread(self._boards.read)).items():
                for line in self._boards.news(board):
                    numbers = {name: line[name] for name in ("direction", "cause", "replicas")}
                    self._coordinator.log.tell("scaling", f"autoscaling of {role}: {line['text']}", role=role, **numbers)
                sums: Sums = {("scaling_decisions_total", role, *key): float(count) for key, count in board.counts.items()}
                self._metrics.hear(("scaling", role, board.origin), sums)
            await asyncio.sleep(BOARDS_INTERVAL_S)

    async def _save(self) -> None:
        """Writes what is due, in a thread: Redis away holds up nobody. What could not be read at the start is read first."""
        while True:
            state = self._coordinator.dirty_state()
            if state is None:
                await asyncio.sleep(TICK_S)
            elif not self._has_read:
                self._take_up(await asyncio.to_thread(self._call_store, self._store.read))
            else:
                self._note_written(await asyncio.to_thread(self._call_store, partial(self._store.write, state)))
            if self._coordinator.saving.error is not None:
                await asyncio.sleep(STORE_RETRY_S)

    @staticmethod
    def _call_store(method: Callable[[], StoredState | None]) -> StoredState | Exception | None:
        try:
            return method()
        except Exception as error:  # whatever it is, it is the store's trouble and not the cluster's
            return error

    def _take_up(self, read: StoredState | Exception | None) -> None:
        if isinstance(read, StoreUnavailable) and read.is_unreadable:
            self._coordinator.log.tell("store", f"{read}; starting without it")
        elif isinstance(read, Exception):
            self._coordinator.saving.failed(str(read))
            return
        elif read is not None:
            self._coordinator.take_up(read)
        self._has_read = True
        self._coordinator.saving.touch()  # what was due before is still to be written

    def _note_written(self, outcome: StoredState | Exception | None) -> None:
        if isinstance(outcome, StoreOutranked):
            self._coordinator.outrank(outcome.epoch)
            self._tell_news()
        elif isinstance(outcome, Exception):
            self._coordinator.saving.failed(str(outcome))
        else:
            self._coordinator.saving.saved()


def _open_store(setup: CoordinatorSetup) -> StateStore:
    settings = setup.state_store
    if settings.redis_url is None:
        return MemoryStore()
    return RedisStore(settings.redis_url, settings.application or setup.application, settings.cluster or cluster_id())
