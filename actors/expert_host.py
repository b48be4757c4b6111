"""An expert host as a Serve replica: pulls what it should hold, loads it beside serving, reports what is ready."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from actors.exchange import Exchange, HostOrders, HostReport, call
from actors.process import configure_logging, node_id, node_ip, this_replica, use_threads
from model.architectures import load_expert, read_config
from model.experts import ExpertSlots
from model.logical_expert import LogicalExpert
from model.weights import Checkpoint
from router.expert_server import ExpertServer, ServerLimits
from router.transport.listener import Listener

logger = logging.getLogger("shoal")
EXPERTS_PER_REPORT = 64
RETRY_INTERVAL_S = 5.0


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


class ExpertHostReplica:
    """One set of expert slots on one device. `coordinator` is the Serve handle of the Coordinator's deployment."""

    def __init__(self, setup: HostSetup, coordinator: Any) -> None:
        configure_logging("host")
        threads = use_threads(setup.threads, sharers=setup.num_hosts)
        self._setup = setup
        self._coordinator = coordinator
        self._key = this_replica()
        self._config = read_config(setup.model_path)
        self._checkpoint = Checkpoint(setup.model_path, torch.device(setup.device), setup.dtype)
        self._slots = ExpertSlots(num_threads=threads)
        limits = ServerLimits(max_queued_tokens=setup.max_queued_tokens, threads=threads)
        self._server = ExpertServer(self._slots, limits, torch.device(setup.device))
        self._listener = Listener(
            secret=setup.secret,
            application=setup.application,
            node_id=node_id(),
            tcp_host=node_ip(),
            on_frame=self._server.on_frame,
            answer_now=self._server.answer_now,
        )
        self._desired: frozenset[LogicalExpert] = frozenset()
        self._failure: str | None = None
        self._num_reports = 0
        self._closed = False
        self._orders_changed = threading.Event()
        self._exchange = Exchange(self._report, self._obey, setup.exchange_interval_s)
        self._loader = threading.Thread(target=self._load_desired, name="loader", daemon=True)
        self._loader.start()

    def check_health(self) -> None:
        """Serve asks this; a host whose compute thread, loader or listener ended is replaced."""
        if not (self._server.is_alive and self._loader.is_alive() and self._listener.is_alive):
            raise RuntimeError("the compute, loader or listener thread ended")

    def __del__(self) -> None:
        self._closed = True
        for part in ("_exchange", "_listener", "_server"):
            if hasattr(self, part):
                getattr(self, part).close()

    def _report(self) -> HostOrders:
        ready = self._slots.held()
        self._num_reports += 1
        report = HostReport(
            key=self._key,
            endpoint=self._listener.endpoint,
            number=self._num_reports,
            ready=ready,
            num_loading=len(self._desired - ready),
            slots=self._setup.slots,
            failure=self._failure,
            stats=self._server.take_stats(),
        )
        orders: HostOrders = call(self._coordinator.exchange_host, report)
        return orders

    def _obey(self, orders: HostOrders) -> None:
        """Make before break: new experts load in the background, and only what no map names is dropped."""
        for expert in self._slots.held() - orders.keep:
            self._slots.unload(expert)
        if orders.desired != self._desired:
            self._desired = orders.desired
            self._orders_changed.set()

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
            retry_at = time.monotonic() + RETRY_INTERVAL_S if self._failure else None
            self._exchange.hurry()

    def _load_missing(self) -> str | None:
        """One pass over what is missing, given up when the orders change; a sentence if an expert cannot be loaded."""
        started_s, loaded = time.monotonic(), 0
        for expert in sorted(self._desired - self._slots.held()):
            if self._closed or self._orders_changed.is_set():
                break
            try:
                self._slots.load(expert, load_expert(self._config, self._checkpoint, expert))
            except Exception as error:  # whatever a damaged file or a full device raises, the operator should read it
                logger.exception("cannot load expert %d of layer %d", expert.expert, expert.layer)
                return f"expert {expert.expert} of layer {expert.layer} cannot be loaded: {error}"
            loaded += 1
            if loaded % EXPERTS_PER_REPORT == 0:
                self._exchange.hurry()
        if loaded:
            logger.info("loaded %d experts in %.1f s", loaded, time.monotonic() - started_s)
        return None
