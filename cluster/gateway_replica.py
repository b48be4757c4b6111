"""The Gateway as a Serve replica: waits for a complete map, keeps the routers' registry, hands text to the text service."""

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.exchange import CALL_TIMEOUT_S, Exchange, GatewayReport, Registry, call
from actors.process import configure_logging, node_id, this_replica
from actors.tracing import TracingSetup, open_provider
from cluster.api.control import ClusterControl
from cluster.api.service import Limits, TextService
from cluster.api.stream_pace import HAPROXY_ITEMS_PER_S, PROXY_ITEMS_PER_S, StreamPace
from cluster.config import AutoscalingSettings, DashboardSettings, GatewaySettings, SecuritySettings, StateStoreSettings
from cluster.doors import check_tls
from cluster.errors import StartError
from cluster.gateway import Gateway
from cluster.guard.body_bounds import BodyBounds
from cluster.guard.http_guard import HttpRules
from cluster.guard.setup import check_binding, make_guards
from cluster.metrics.request_log import RequestLog
from cluster.metrics.request_metrics import RequestMetrics
from cluster.metrics.watch import CallTracer, Watch
from cluster.ray_cluster import cluster_id, has_haproxy, http_host
from cluster.remote_coordinator import RemoteCoordinator
from cluster.router_pool import RouterPool
from model.architectures import read_config
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from router.placement_map import Endpoint
from router.transport.messages import MessageClient

logger = logging.getLogger("shoal")
# Until the first router is there a gateway asks often: its own start, and so everybody's, waits for the answer.
IMPATIENT_INTERVAL_S = 0.2
# The routers start at the same time; one that is much later than the first does not hold up the door.
LAST_ROUTER_WAIT_S = 5.0


@dataclass(frozen=True)
class GatewaySetup:
    """Everything one gateway needs to know; the application's builder fills it in.

    `autoscaling` is what an operator's bounds are held against; None: they are taken as they come.
    """

    application: str
    model_path: str
    secret: bytes
    settings: GatewaySettings
    exchange_interval_s: float
    autoscaling: AutoscalingSettings | None = None
    dashboard: DashboardSettings | None = None
    security: SecuritySettings = field(default_factory=SecuritySettings)
    state_store: StateStoreSettings = field(default_factory=StateStoreSettings)
    tracing: TracingSetup | None = None
    logs_requests: bool = False


class GatewayReplica(Gateway):
    """`coordinator` is a Serve handle; `parts` are the other deployments' handles, here so that Serve deploys them.

    The constructor returns when a router has adopted a complete map, so that Serve's RUNNING means it can answer.
    StartError if an expert cannot be loaded, or nothing is ready in time.
    """

    def __init__(self, setup: GatewaySetup, coordinator: Any, parts: list[Any]) -> None:  # noqa: ARG002 - see above
        configure_logging("gateway")
        self._setup = setup
        self._coordinator = coordinator
        self._node_id = node_id()
        self._key = this_replica()
        self._metrics = RequestMetrics()
        self._registry = Registry(())
        self._decided = threading.Event()
        self._first_router_s: float | None = None
        check_tls(setup.security, has_haproxy=has_haproxy())
        check_binding(http_host() or "localhost", setup.security)
        guards = make_guards(setup.security, setup.state_store, setup.application, cluster_id())
        tokenizer = _tokenizer(setup.model_path)
        self._exchange = Exchange(self._ask, self._note, IMPATIENT_INTERVAL_S)
        self._wait()
        self._exchange.interval_s = setup.exchange_interval_s
        self._pool = RouterPool(self._connect, lambda: self._registry.routers, on_resubmission=self._metrics.resubmitted)
        config = read_config(setup.model_path)
        settings = setup.settings
        service = TextService(
            setup.application,
            self._pool,
            tokenizer,
            vocab_size=config.vocab_size,
            max_model_len=self._max_model_len(),
            end_token_ids=config.eos_token_ids,
            limits=Limits(
                settings.default_timeout_s,
                settings.max_timeout_s,
                max_sequences=settings.max_answers,
                max_prompt_bytes=settings.max_prompt_bytes,
                max_prompt_tokens=settings.max_prompt_tokens,
            ),
            pace=StreamPace(HAPROXY_ITEMS_PER_S if has_haproxy() else PROXY_ITEMS_PER_S),
            watch=Watch(self._metrics, self._call_tracer(), RequestLog(setup.application) if setup.logs_requests else None),
        )
        control = ClusterControl(RemoteCoordinator(coordinator, CALL_TIMEOUT_S), setup.autoscaling)
        rules = HttpRules(guards.http, BodyBounds(settings.max_body_bytes, settings.body_timeout_s), setup.security.open_metrics)
        super().__init__(service, control, lambda: bool(self._registry.routers), setup.dashboard, rules, guards.grpc)

    def __del__(self) -> None:
        if hasattr(self, "_exchange"):
            self._exchange.close()
        if hasattr(self, "_provider"):
            self._provider.shutdown()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this, and gives it to the autoscaling policy: the bounds that an operator has set."""
        return dict(self._registry.scaling)

    def _call_tracer(self) -> CallTracer | None:
        if self._setup.tracing is None:
            return None
        from cluster.metrics.call_tracer import OtelCallTracer  # what is not configured is not imported

        self._provider = open_provider(self._setup.tracing, "gateway")
        return OtelCallTracer(self._provider.get_tracer("shoal"), self._setup.application)

    def _wait(self) -> None:
        in_time = self._decided.wait(self._setup.settings.start_timeout_s)
        if not self._registry.routers:
            self._exchange.close()
            assert self._registry.failure or not in_time
            raise StartError(self._registry.failure or f"not ready in time: {self._registry.progress}")

    def _max_model_len(self) -> int:
        """What the checkpoint takes, or less where a router's KV cache holds less."""
        return min(int(router.stats["max_model_len"]) for router in self._registry.routers)

    def _ask(self) -> Registry:
        report = GatewayReport(self._key, self._metrics.sums(), {"num_open": float(self._metrics.num_open)})
        registry: Registry = call(self._coordinator.registry, report)
        return registry

    def _note(self, registry: Registry) -> None:
        self._registry = registry
        if registry.routers and self._first_router_s is None:
            self._first_router_s = time.monotonic()
        late = self._first_router_s is not None and time.monotonic() - self._first_router_s > LAST_ROUTER_WAIT_S
        if registry.is_complete or late or registry.failure:
            self._decided.set()

    async def _connect(self, endpoint: Endpoint) -> MessageClient:
        return await MessageClient.connect(endpoint, self._node_id, self._setup.secret, self._setup.application)


def _tokenizer(model_path: str) -> Tokenizer | None:
    """None for a checkpoint without one: it is served by token ids."""
    try:
        return Tokenizer(Path(model_path))
    except TokenizerError as error:
        logger.warning("serving token ids only: %s", error)
        return None
