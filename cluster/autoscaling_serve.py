"""The policies of `cluster.autoscaling` as Ray Serve's controller calls them, and the Serve settings that go with them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from ray.util.metrics import Gauge

from cluster.autoscaling import (
    Bounds,
    Decision,
    Fleet,
    History,
    HostLoad,
    HostTargets,
    Limit,
    Pace,
    RouterLoad,
    RouterTargets,
    Signal,
    decide,
    effective_bounds,
    gateway_signals,
    host_floor,
    host_signals,
    router_signals,
)
from cluster.config import AutoscalingSettings, ScalingSettings
from cluster.scaling_board import BoardWriter, KeyValues, RayKeyValues

logger = logging.getLogger("ray.serve")  # the controller's own log, where an operator looks for scaling
Role = Literal["gateway", "router", "expert_host"]
STATE_KEY = "shoal"


class Context(Protocol):
    """What we read of ray.serve.config.AutoscalingContext."""

    current_num_replicas: int
    target_num_replicas: int
    policy_state: dict[str, Any]
    current_time: float | None
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...  # noqa: D102

    @property
    def total_num_requests(self) -> float: ...  # noqa: D102


def autoscaling_config(
    settings: AutoscalingSettings,
    role: Role,
    replicas: int,
    num_experts: int = 0,
    min_replicas_per_expert: int = 1,
    application: str | None = None,
) -> dict[str, Any] | None:
    """Serve's `autoscaling_config` for one deployment that starts with `replicas`; None where the role does not scale.

    Serve holds the hard bounds, min_replicas and ceiling; reaction and cool-down are ours, so Serve's own delays are 0.
    """
    scaling: ScalingSettings | None = getattr(settings, role)
    if scaling is None:
        return None
    initial = min(max(replicas, scaling.min_replicas), scaling.ceiling_replicas)
    return {
        "min_replicas": scaling.min_replicas,
        "initial_replicas": initial,
        "max_replicas": scaling.ceiling_replicas,
        "metrics_interval_s": settings.metrics_interval_s,
        "look_back_period_s": 2 * settings.metrics_interval_s,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {
            "policy_function": "cluster.autoscaling_serve:ScalingPolicy",
            "policy_kwargs": {
                "role": role,
                "settings": scaling.model_dump(),
                "num_experts": num_experts,
                "min_replicas_per_expert": min_replicas_per_expert,
                "application": application,
            },
        },
    }


class ScalingPolicy:
    """One role's policy; Serve makes one for each deployment and calls it about ten times a second. It never raises."""

    def __init__(
        self,
        role: Role,
        settings: dict[str, Any],
        num_experts: int = 0,
        min_replicas_per_expert: int = 1,
        application: str | None = None,
        boards: KeyValues | None = None,
    ) -> None:
        self._role = role
        self._settings = settings
        self._num_experts = num_experts
        self._min_replicas_per_expert = min_replicas_per_expert
        self._pace = Pace(**{name: settings[name] for name in ("reaction_s", "cooldown_s", "headroom", "tolerance")})
        self._said: tuple[int, Limit | None] | None = None
        self._gauges: _Gauges | None = None
        self._application = application
        self._boards = boards
        self._board: BoardWriter | None = None
        self._has_failed = False

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Replicas to ask for, and the state that Serve hands to the next call. On an error of ours: no change."""
        try:
            decision = self.decide(context)
            self._tell(decision, context.target_num_replicas)
        except Exception:  # a policy that raises stops the scaling of every application in this Serve
            if not self._has_failed:
                logger.exception("the autoscaling policy of %s failed; its number of replicas stays", self._role)
            self._has_failed = True
            return context.target_num_replicas, dict(context.policy_state)
        return decision.replicas, {STATE_KEY: decision.history.as_dict()}

    def decide(self, context: Context) -> Decision:
        """The decision itself, with its reason."""
        reports = by_replica(context.aggregated_metrics or {})
        hard = Bounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas)
        signals, floor, num_reporting = self._read(reports, context)
        configured = Bounds(self._settings["min_replicas"], self._settings["max_replicas"], floor)
        return decide(
            signals,
            Fleet(context.target_num_replicas, context.current_num_replicas, num_reporting),
            effective_bounds(configured, reports, hard),
            self._pace,
            History.from_dict(context.policy_state.get(STATE_KEY, {})),
            context.current_time or 0.0,
        )

    def _read(self, reports: Sequence[Mapping[str, float]], context: Context) -> tuple[tuple[Signal, ...], int, int]:
        """The role's signals, its floor, and how many replicas they are from."""
        settings = self._settings
        if self._role == "gateway":
            return gateway_signals(context.total_num_requests, settings["ongoing_requests"]), 0, context.current_num_replicas
        if self._role == "router":
            routers = [load for load in map(router_load, reports) if load is not None]
            targets = RouterTargets(**{name: settings[name] for name in RouterTargets.__dataclass_fields__})
            return router_signals(routers, targets), 0, len(routers)
        hosts = [load for load in map(host_load, reports) if load is not None]
        floor = host_floor(self._num_experts, self._min_replicas_per_expert, [load.slots for load in hosts])
        return host_signals(hosts, HostTargets(**{name: settings[name] for name in HostTargets.__dataclass_fields__})), floor, len(hosts)

    def _tell(self, decision: Decision, target: int) -> None:
        """A line in the controller's log when the number or the limit changes, and gauges that always hold."""
        said = (decision.replicas, decision.limit)
        if decision.limit is not None and (self._said is None or self._said[1] != decision.limit):
            logger.warning("autoscaling of %s is limited by %s: %s", self._role, decision.limit, decision.reason)
        elif decision.replicas != target and said != self._said:
            logger.info("autoscaling of %s: %s", self._role, decision.reason)
        if self._board is None and self._application is not None:
            self._board = BoardWriter(self._application, self._role, self._boards or RayKeyValues())
        if self._board is not None and decision.replicas != target and said != self._said:
            self._board.tell(decision, target)
        self._said = said
        if self._gauges is None:
            self._gauges = _Gauges()
        self._gauges.set(self._role, decision)


class _Gauges:
    """In Ray's own exporter, from the controller's process."""

    def __init__(self) -> None:
        self._wanted = Gauge("shoal_autoscaling_wanted_replicas", "What the load asks for, before bounds.", tag_keys=("role",))
        self._limited = Gauge(
            "shoal_autoscaling_limited", "1 while this bound keeps the role from what it wants.", tag_keys=("role", "limit")
        )

    def set(self, role: str, decision: Decision) -> None:
        self._wanted.set(decision.wanted, {"role": role})
        for limit in Limit:
            self._limited.set(float(decision.limit is limit), {"role": role, "limit": limit.value})


def by_replica(metrics: Mapping[str, Mapping[Any, float]]) -> list[dict[str, float]]:
    """Serve's {metric: {replica: value}} turned round: one dict for each replica that has reported anything."""
    reports: dict[Any, dict[str, float]] = {}
    for name, values in metrics.items():
        for replica, value in values.items():
            reports.setdefault(replica, {})[name] = value
    return list(reports.values())


def host_load(report: Mapping[str, float]) -> HostLoad | None:
    """A host's metrics (actors.scaling_metrics.host_metrics) as the policy's value; None from a replica that has not begun."""
    if "busy" not in report:
        return None
    return HostLoad(report["busy"], report.get("queue_wait_s"), report.get("slots"), report.get("ready", 1.0) > 0)


def router_load(report: Mapping[str, float]) -> RouterLoad | None:
    """A router's metrics (actors.scaling_metrics.router_metrics) as the policy's value; None from a replica that has not begun."""
    if "kv_use" not in report:
        return None
    return RouterLoad(report["kv_use"], report.get("num_waiting_tokens"), report.get("num_waiting"), report.get("busy"))
