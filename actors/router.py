"""The gating router as a Serve replica: loads the dense part, meets hosts and gateways, reports to the Coordinator."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from actors.duties import FinishLimits, RouterDuties
from actors.exchange import Exchange, RouterOrders, RouterReport, call
from actors.metrics import router_sums
from actors.process import configure_logging, node_id, node_ip, num_cores, this_replica, use_threads
from actors.scaling_metrics import router_metrics
from actors.tracing import TracingSetup, open_provider
from model import cpu_threads
from model.config import ModelConfig
from model.loading import load_dense
from model.tokenizer import Tokenizer
from router.constraint_compiler import GrammarCompiler
from router.dispatch import DispatchLimits, DistributedExperts
from router.engine import Engine, EngineConfig, default_num_pages
from router.placement_map import Endpoint, HostKey, MapVersion
from router.service import RouterService
from router.transport.channel import Channel
from router.transport.connect import connect
from router.transport.listener import Listener

if TYPE_CHECKING:
    from actors.router_tracing import RouterTracer

logger = logging.getLogger("shoal")
CPU_KV_CACHE_BYTES = 1 << 30
GPU_KV_CACHE_SHARE = 0.8  # of what is free once the weights are loaded
LEAVE_CHECK_S = 0.05
URGENCY_S = 10.0  # so long a lost host is reported without delay; then it is no news any more


@dataclass(frozen=True)
class RouterSetup:
    """Everything one router needs to know; the application's builder fills it in."""

    application: str
    model_path: str
    device: str
    dtype: torch.dtype
    threads: int | None
    num_sharers: int  # who computes at the same time on the same cores: hosts, while shared experts run
    secret: bytes
    exchange_interval_s: float
    step_timeout_s: float
    page_size: int
    kv_cache_bytes: int | None
    max_batch_tokens: int
    prefill_chunk: int
    max_running: int
    max_waiting: int
    max_model_len: int
    stop_timeout_s: float  # Serve kills a replica that takes longer to stop
    tracing: TracingSetup | None = None


class RouterReplica:
    """One gating router. `coordinator` is the Serve handle of the Coordinator's deployment."""

    experts_type: ClassVar[type[DistributedExperts]] = DistributedExperts  # another one routes as a recording says

    def __init__(self, setup: RouterSetup, coordinator: Any) -> None:
        configure_logging("router")
        use_threads(setup.threads, setup.num_sharers, has_crew=setup.device == "cpu" and setup.dtype == torch.float32)
        cpu_threads.allow(setup.threads or num_cores())  # those of hosts at work are lent to them
        self._setup = setup
        self._coordinator = coordinator
        self._key = this_replica()
        self._node_id = node_id()
        self._duties = RouterDuties()
        self._suspects: tuple[frozenset[HostKey], float] = (frozenset(), 0.0)
        self._num_reports = 0
        self._closed = False
        device = torch.device(setup.device)
        started_s = time.monotonic()
        model = load_dense(setup.model_path, device, setup.dtype)
        self._is_dense = not model.config.moe_layers
        limits = DispatchLimits(step_timeout_s=setup.step_timeout_s, num_cores=num_cores())
        self._experts = self.experts_type(self._open_channel, lambda: self._duties.map, limits)
        num_pages = default_num_pages(model.cache_layout, setup.page_size, self._kv_cache_bytes(device))
        config = EngineConfig(
            page_size=setup.page_size,
            num_pages=num_pages,
            max_batch_tokens=setup.max_batch_tokens,
            max_running=setup.max_running,
            max_waiting=setup.max_waiting,
            prefill_chunk=setup.prefill_chunk,
            max_model_len=min(setup.max_model_len, num_pages * setup.page_size),
        )
        self._max_model_len = config.max_model_len
        tracer = self._tracer()
        experts = self._experts if tracer is None else tracer.experts(self._experts)
        self._engine = Engine(model, experts, config, device, grammars=self._grammars(model.config))
        self._service = RouterService(self._engine, self._experts, lambda: self._duties.map, tracer)
        self._listener = Listener(
            secret=setup.secret,
            application=setup.application,
            node_id=self._node_id,
            tcp_host=node_ip(),
            on_message=self._service.on_message,
            on_message_close=self._service.on_close,
        )
        logger.info("dense part loaded in %.1f s, %d KV pages of %d tokens", time.monotonic() - started_s, num_pages, setup.page_size)
        self._exchange = Exchange(self._report, self._obey, setup.exchange_interval_s, self._is_urgent)

    def check_health(self) -> None:
        """Serve asks this; a router whose engine or listener ended is replaced."""
        if not (self._service.is_alive and self._listener.is_alive):
            raise RuntimeError("the engine's or the listener's thread ended")

    def __del__(self) -> None:
        if hasattr(self, "_exchange") and not self._closed:
            self._leave()
        self._closed = True
        for part in ("_exchange", "_service", "_experts", "_listener"):
            if hasattr(self, part):
                getattr(self, part).close()
        if hasattr(self, "_provider"):
            self._provider.shutdown()

    def _leave(self) -> None:
        """Serve stops this replica: gateways send it nothing new, and what it has it finishes."""
        limits = FinishLimits(self._setup.stop_timeout_s, settle_s=2 * self._setup.exchange_interval_s)
        self._duties.is_leaving = True
        self._exchange.hurry()
        started_s = time.monotonic()
        leaving_s = 0.0
        while (why := limits.reason_to_go(leaving_s, is_idle=not self._engine.has_work, may_leave=self._duties.may_leave)) is None:
            time.sleep(LEAVE_CHECK_S)
            leaving_s = time.monotonic() - started_s
        logger.info("leaving after %.1f s: %s", leaving_s, why)

    def _tracer(self) -> "RouterTracer | None":
        if self._setup.tracing is None:
            return None
        from actors.router_tracing import RouterTracer  # what is not configured is not imported

        self._provider = open_provider(self._setup.tracing, "router")
        return RouterTracer(self._provider.get_tracer("shoal"), self._setup.tracing.dispatch_share)

    def _grammars(self, config: ModelConfig) -> GrammarCompiler:
        """For constrained requests; nothing is loaded before the first of them comes."""
        directory = Path(self._setup.model_path)
        return GrammarCompiler(lambda: Tokenizer(directory), config.vocab_size, config.eos_token_ids)

    def _kv_cache_bytes(self, device: torch.device) -> int:
        if self._setup.kv_cache_bytes is not None:
            return self._setup.kv_cache_bytes
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0] * GPU_KV_CACHE_SHARE)
        return CPU_KV_CACHE_BYTES

    def _open_channel(self, key: HostKey, endpoint: Endpoint) -> Channel:  # noqa: ARG002 - the endpoint is new with every incarnation
        return connect(endpoint, self._node_id, self._setup.secret, self._setup.application)

    def _adopted(self) -> MapVersion | None:
        """A dense model pins no expert: whatever is published is adopted."""
        if self._is_dense:
            return self._duties.held
        return self._experts.acknowledged

    def _is_urgent(self) -> bool:
        """A host that has just been lost may be all that holds an expert: then requests wait for the Coordinator."""
        known, since_s = self._suspects
        suspects, now = self._experts.suspects, time.monotonic()
        if suspects != known:
            self._suspects, since_s = (suspects, now), now
        return bool(suspects) and now - since_s < URGENCY_S

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this, and gives it to the autoscaling policy."""
        return router_metrics(self._engine.load.as_dict(), self._duties.scaling)

    def _report(self) -> RouterOrders:
        self._num_reports += 1
        load, experts = self._engine.load.as_dict(), self._experts
        report = RouterReport(
            key=self._key,
            endpoint=self._listener.endpoint,
            number=self._num_reports,
            adopted=self._adopted(),
            suspects=tuple(self._experts.suspects),
            dead=tuple(self._experts.dead_hosts),
            stats={**load, "max_model_len": float(self._max_model_len)},
            expert_tokens=self._experts.take_load(),
            epoch_seen=self._duties.epoch_seen,
            held=self._duties.held,
            is_leaving=self._duties.is_leaving,
            sums=router_sums(load, self._service.step_s, experts.num_frames, dict(experts.num_by_trouble), self._engine.queue_time),
        )
        orders: RouterOrders = call(self._coordinator.exchange_router, report)
        return orders

    def _obey(self, orders: RouterOrders) -> None:
        epoch = self._duties.epoch_seen
        has_map = self._duties.obey(orders)
        if has_map:
            self._service.wake()
        if has_map or self._duties.epoch_seen != epoch:
            self._exchange.hurry()
