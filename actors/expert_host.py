"""An expert host as a Serve replica: pulls what it should hold, loads it beside serving, reports what is ready."""

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from actors.duties import HostDuties, LeaveLimits
from actors.exchange import Exchange, HostOrders, HostReport, call
from actors.metrics import HostSums
from actors.process import configure_logging, node_id, node_ip, this_replica, use_threads
from actors.scaling_metrics import SharedSums, host_metrics
from model.architectures import load_expert, read_config
from model.experts import ExpertSlots
from model.weights import Checkpoint
from router.cost_probe import measure_speed
from router.expert_server import ExpertServer, ServerLimits
from router.transport.listener import Listener

logger = logging.getLogger("shoal")
EXPERTS_PER_REPORT = 64
RETRY_INTERVAL_S = 5.0
LEAVE_CHECK_S = 0.05


@dataclass(frozen=True)
class HostSetup:
    """Everything one host needs to know; the application's builder fills it in."""

    application: str
    model_path: str
    device: str
    dtype: torch.dtype | None  # None: as stored
    threads: int | None
    num_hosts: int
    slots: int | None
    secret: bytes
    exchange_interval_s: float
    max_queued_tokens: int
    bytes_limit: int | None
    speed: float
    stop_timeout_s: float  # Serve kills a replica that takes longer to stop


class ExpertHostReplica:
    """One set of expert slots on one device. `coordinator` is the Serve handle of the Coordinator's deployment."""

    slots_type: ClassVar[type[ExpertSlots]] = ExpertSlots  # another one meters what it computes, where cores are few

    def __init__(self, setup: HostSetup, coordinator: Any) -> None:
        configure_logging("host")
        threads = use_threads(setup.threads, setup.num_hosts, has_crew=setup.device == "cpu")
        self._setup = setup
        self._coordinator = coordinator
        self._key = this_replica()
        self._config = read_config(setup.model_path)
        self._checkpoint = Checkpoint(setup.model_path, torch.device(setup.device), setup.dtype)
        self._slots = self.slots_type(num_threads=threads)
        limits = ServerLimits(max_queued_tokens=setup.max_queued_tokens, threads=torch.get_num_threads())
        self._server = ExpertServer(self._slots, limits, torch.device(setup.device))
        self._listener = Listener(
            secret=setup.secret,
            application=setup.application,
            node_id=node_id(),
            tcp_host=node_ip(),
            on_frame=self._server.on_frame,
            in_place=self._server.in_place,
        )
        self._endpoint = self._listener.endpoint
        self._is_measured = False
        self._duties = HostDuties()
        self._stats = SharedSums(self._server.take_stats, time.monotonic)
        self._sums = HostSums()
        self._expert_bytes = 0
        self._failure: str | None = None
        self._num_reports = 0
        self._closed = False
        self._orders_changed = threading.Event()
        self._exchange = Exchange(self._report, self._obey, setup.exchange_interval_s, lambda: self._duties.is_leaving)
        self._loader = threading.Thread(target=self._load_desired, name="loader", daemon=True)
        self._loader.start()

    def check_health(self) -> None:
        """Serve asks this; a host whose compute thread, loader or listener ended is replaced."""
        if not (self._server.is_alive and self._loader.is_alive() and self._listener.is_alive):
            raise RuntimeError("the compute, loader or listener thread ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this, and gives it to the autoscaling policy."""
        stats, interval_s = self._stats.take("scaling")
        limit = self._setup.bytes_limit
        num_ready = len(self._slots.held())
        return host_metrics(stats, interval_s, num_ready, self._setup.slots, self._duties.scaling, self._expert_bytes, limit)

    def __del__(self) -> None:
        if hasattr(self, "_loader") and not self._closed:
            self._leave()
        self._closed = True
        for part in ("_exchange", "_listener", "_server"):
            if hasattr(self, part):
                getattr(self, part).close()

    def _leave(self) -> None:
        """Serve stops this replica: hands over what it holds before it goes, and serves until then."""
        limits = LeaveLimits(self._setup.stop_timeout_s)
        self._duties.is_leaving = True
        self._exchange.hurry()
        started_s = now = time.monotonic()
        while (why := limits.reason_to_go(now - started_s, now - self._exchange.answered_s, may_leave=self._duties.may_leave)) is None:
            time.sleep(LEAVE_CHECK_S)
            now = time.monotonic()
        logger.info("leaving after %.1f s: %s", now - started_s, why)

    def _report(self) -> HostOrders:
        is_leaving = self._duties.is_leaving
        ready = self._slots.held()
        self._num_reports += 1
        stats = self._stats.take("report")[0]
        report = HostReport(
            key=self._key,
            endpoint=self._endpoint,
            number=self._num_reports,
            ready=ready,
            num_loading=len(self._duties.desired - ready),
            slots=self._setup.slots,
            failure=self._failure,
            stats=stats,
            expert_bytes=self._expert_bytes,
            bytes_limit=self._setup.bytes_limit,
            speed=self._setup.speed,
            is_leaving=is_leaving,
            epoch_seen=self._duties.epoch_seen,
            sums=self._sums.add(stats),
        )
        orders: HostOrders = call(self._coordinator.exchange_host, report)
        return orders

    def _obey(self, orders: HostOrders) -> None:
        """Make before break: new experts load in the background, and only what no map in use names is dropped."""
        before, epoch = self._duties.desired, self._duties.epoch_seen
        dropped = self._duties.obey(orders, self._slots.held())
        for expert in dropped:
            self._slots.unload(expert)
        if dropped or self._duties.desired != before:
            self._orders_changed.set()
        if dropped or self._duties.epoch_seen != epoch:
            self._exchange.hurry()

    def _load_desired(self) -> None:
        """Until closed: loads what is desired and not held. What cannot be loaded is reported, and tried again after a while."""
        torch.set_num_threads(1)
        retry_at: float | None = None
        while not self._closed:
            due = retry_at is not None and time.monotonic() >= retry_at
            if not self._orders_changed.wait(timeout=1.0) and not due:
                continue
            self._orders_changed.clear()
            self._failure = self._load_missing()
            self._measure()
            retry_at = time.monotonic() + RETRY_INTERVAL_S if self._failure else None
            self._exchange.hurry()

    def _measure(self) -> None:
        """Once, when there is something to measure: what an expert and a token cost here, told with the address."""
        held = self._slots.held()
        if self._is_measured or not held or self._closed:
            return
        self._is_measured = True
        speed = measure_speed(self._server.on_frame, held, self._config.hidden_size)
        if speed is not None:
            self._endpoint = replace(self._endpoint, alpha_s=speed.alpha_s, beta_s=speed.beta_s)
            logger.info("an activated expert costs %.2f ms, a token in it %.3f ms", 1e3 * speed.alpha_s, 1e3 * speed.beta_s)

    def _load_missing(self) -> str | None:
        """One pass over what is missing, given up when the orders change; a sentence if an expert cannot be loaded."""
        started_s, loaded = time.monotonic(), 0
        for expert in self._duties.to_load(self._slots.held(), self._setup.slots):
            if self._closed or self._orders_changed.is_set():
                break
            try:
                weights = load_expert(self._config, self._checkpoint, expert)
                self._expert_bytes = max(self._expert_bytes, weights.gate_up.nbytes + weights.down.nbytes)
                self._slots.load(expert, weights)
            except Exception as error:  # whatever a damaged file or a full device raises, the operator should read it
                logger.exception("cannot load expert %d of layer %d", expert.expert, expert.layer)
                return f"expert {expert.expert} of layer {expert.layer} cannot be loaded: {error}"
            loaded += 1
            if loaded % EXPERTS_PER_REPORT == 0:
                self._exchange.hurry()
        if loaded:
            logger.info("loaded %d experts in %.1f s", loaded, time.monotonic() - started_s)
        return None
