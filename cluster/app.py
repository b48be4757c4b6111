"""The Serve application: four deployments, their resources, and the builder that KubeRay imports as `cluster.app:build`."""

import os
import secrets
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application, Deployment

from actors.expert_host import ExpertHostReplica, HostSetup
from actors.router import RouterReplica, RouterSetup
from actors.tracing import TracingSetup
from cluster.autoscaling_serve import autoscaling_config
from cluster.config import ShoalConfig
from cluster.coordinator_limits import CoordinatorLimits
from cluster.coordinator_replica import CoordinatorReplica, CoordinatorSetup
from cluster.errors import ConfigError
from cluster.gateway_replica import GatewayReplica, GatewaySetup
from cluster.placement import PlannerSettings
from cluster.secrets_from_environment import with_secrets
from cluster.state_store import RedisStore, StoreUnavailable
from model.architectures import read_config
from model.config import ModelConfig, read_json
from model.loading import logical_experts

# A replica closes its sockets and threads in well under this; Serve kills it after.
STOP: dict[str, Any] = {"graceful_shutdown_timeout_s": 5.0, "graceful_shutdown_wait_loop_s": 0.1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(args: ShoalConfig) -> Application:
    """The application for one checkpoint. Raises ConfigError, CheckpointError or UnsupportedModel before any replica starts."""
    args = with_secrets(args, os.environ)
    model = read_config(args.model.path)
    max_model_len = _max_model_len(args, model)
    num_hosts = _num_hosts(args, model)
    device, secret = resolve_device(args), (args.security.secret or secrets.token_hex(32)).encode()
    dtype = _dtype(args, device)
    experts, min_replicas = logical_experts(model), args.placement.min_replicas
    host_scaling = autoscaling_config(args.autoscaling, "expert_host", num_hosts, len(experts), min_replicas, args.name)
    router_scaling = autoscaling_config(args.autoscaling, "router", args.router.replicas, application=args.name)
    limits = _limits(args, _at_start(host_scaling, num_hosts), _at_start(router_scaling, args.router.replicas))
    _check_state_store(args)
    setup = CoordinatorSetup(
        args.name,
        experts,
        limits,
        args.state_store,
        hold_s=args.coordinator.exchange_interval_s,
        metrics=args.metrics,
        scales=any((args.autoscaling.expert_host, args.autoscaling.router, args.autoscaling.gateway)),
    )
    coordinator = _deployment(CoordinatorReplica, "Coordinator", 1, args.coordinator.cpus, args.coordinator.resources).bind(setup)
    router = _deployment(
        RouterReplica,
        "Router",
        args.router.replicas,
        args.router.cpus,
        args.router.resources,
        args.router.gpus if device == "cuda" else 0,
        router_scaling,
        graceful_shutdown_timeout_s=args.router.drain_timeout_s,
    ).bind(_router_setup(args, device, dtype, secret, max_model_len, has_hosts=num_hosts > 0), coordinator)
    parts = [router]
    if num_hosts:
        parts.append(
            _deployment(
                ExpertHostReplica,
                "ExpertHost",
                num_hosts,
                args.expert_host.cpus,
                args.expert_host.resources,
                args.expert_host.gpus if device == "cuda" else 0,
                host_scaling,
                graceful_shutdown_timeout_s=args.placement.drain_timeout_s,
            ).bind(_host_setup(args, device, _storage_dtype(args, device, dtype), secret, num_hosts), coordinator)
        )
    gateway = GatewaySetup(
        args.name,
        args.model.path,
        secret,
        args.gateway,
        args.coordinator.exchange_interval_s,
        args.autoscaling,
        dashboard=args.dashboard,
        security=args.security,
        state_store=args.state_store,
    )
    gateway = replace(gateway, tracing=_tracing(args), logs_requests=args.metrics.log_requests)
    return _deployment(
        serve.ingress()(GatewayReplica),
        "Gateway",
        args.gateway.replicas,
        args.gateway.cpus,
        args.gateway.resources,
        autoscaling=autoscaling_config(args.autoscaling, "gateway", args.gateway.replicas, application=args.name),
        max_ongoing_requests=args.gateway.max_ongoing_requests,
        graceful_shutdown_timeout_s=args.gateway.drain_timeout_s,
    ).bind(gateway, coordinator, parts)


def check_layout(args: ShoalConfig, model: ModelConfig) -> int:
    """How many expert hosts it has, 0 for a dense model.

    Raises ConfigError for what no cluster could run: a length the checkpoint was not made for, experts without a host.
    """
    _max_model_len(args, model)
    return _num_hosts(args, model)


def resolve_device(args: ShoalConfig) -> str:
    """`auto` takes GPUs where the Ray cluster has any."""
    if args.model.device != "auto":
        return args.model.device
    return "cuda" if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _deployment(
    replica: type,
    name: str,
    replicas: int,
    cpus: float,
    resources: dict[str, float] | None = None,
    gpus: float = 0,
    autoscaling: dict[str, Any] | None = None,
    **options: Any,
) -> Deployment:
    actor = {"num_cpus": cpus, "num_gpus": gpus, "resources": resources or {}}
    number = {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    options = {"max_ongoing_requests": 1000, **STOP, **number, **options}
    return serve.deployment(name=name, ray_actor_options=actor, **options)(replica)


def _at_start(autoscaling: dict[str, Any] | None, replicas: int) -> int:
    """How many Serve starts."""
    return replicas if autoscaling is None else int(autoscaling["initial_replicas"])


def _check_state_store(args: ShoalConfig) -> None:
    """Raises ConfigError for a URL that no client takes; whether anybody answers there is seen when it runs."""
    if args.state_store.redis_url is not None:
        try:
            RedisStore(args.state_store.redis_url, args.name, "").close()
        except StoreUnavailable as error:
            raise ConfigError(str(error)) from error


def _limits(args: ShoalConfig, num_hosts: int, num_routers: int) -> CoordinatorLimits:
    coordinator, placement = args.coordinator, args.placement
    return CoordinatorLimits(
        num_hosts=num_hosts,
        num_routers=num_routers,
        lease_s=coordinator.lease_s,
        orphan_grace_s=placement.orphan_grace_s,
        rescue_grace_s=placement.rescue_grace_s,
        rebalance_interval_s=placement.rebalance_interval_s,
        operation_timeout_s=coordinator.operation_timeout_s,
        short_window_s=coordinator.short_window_s,
        long_window_s=coordinator.long_window_s,
        planner=PlannerSettings(**{entry.name: getattr(placement, entry.name) for entry in fields(PlannerSettings)}),
    )


def _max_model_len(args: ShoalConfig, model: ModelConfig) -> int:
    wanted, own = args.model.max_model_len, model.max_position_embeddings
    if wanted is not None and wanted > own:
        raise ConfigError(f"model.max_model_len is {wanted}, but the checkpoint was made for {own} tokens at most")
    return wanted or own


def _num_hosts(args: ShoalConfig, model: ModelConfig) -> int:
    """A dense model needs no host, whatever the default says; an MoE model needs one at least."""
    if not model.moe_layers:
        return 0
    if args.expert_host.replicas == 0:
        raise ConfigError(f"expert_host.replicas is 0, but {model.model_type} has routed experts: at least 1 host must hold them")
    return args.expert_host.replicas


def _dtype(args: ShoalConfig, device: str) -> torch.dtype:
    """`auto`: float32 arithmetic on a CPU, the checkpoint's own type on a GPU (bfloat16 where it names none that we compute in)."""
    if args.model.dtype != "auto":
        return DTYPES[args.model.dtype]
    if device == "cpu":
        return torch.float32
    raw = read_json(Path(args.model.path) / "config.json")
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)


def _storage_dtype(args: ShoalConfig, device: str, dtype: torch.dtype) -> torch.dtype | None:
    """How hosts keep experts. None: as the checkpoint has them, which a CPU widens as it reads, exactly and at half the bytes."""
    return None if args.model.dtype == "auto" and device == "cpu" else dtype


def _router_setup(args: ShoalConfig, device: str, dtype: torch.dtype, secret: bytes, max_model_len: int, *, has_hosts: bool) -> RouterSetup:
    router = args.router
    return RouterSetup(
        application=args.name,
        model_path=args.model.path,
        device=device,
        dtype=dtype,
        threads=router.threads,
        # Threads that wait for work spin for a while, and what they spin on would be the hosts' cores.
        num_sharers=2 if has_hosts and device == "cpu" else 1,
        secret=secret,
        exchange_interval_s=args.coordinator.exchange_interval_s,
        step_timeout_s=router.step_timeout_s,
        page_size=router.page_size,
        kv_cache_bytes=router.kv_cache_bytes,
        max_batch_tokens=router.max_batch_tokens,
        prefill_chunk=router.prefill_chunk,
        max_running=router.max_running,
        max_waiting=router.max_waiting,
        max_model_len=max_model_len,
        stop_timeout_s=router.drain_timeout_s,
        tracing=_tracing(args),
    )


def _tracing(args: ShoalConfig) -> TracingSetup | None:
    tracing = args.tracing
    return TracingSetup(tracing.otlp_endpoint, args.name, tracing.share, tracing.dispatch_share) if tracing.otlp_endpoint else None


def _host_setup(args: ShoalConfig, device: str, dtype: torch.dtype | None, secret: bytes, num_hosts: int) -> HostSetup:
    host = args.expert_host
    return HostSetup(
        application=args.name,
        model_path=args.model.path,
        device=device,
        dtype=dtype,
        threads=host.threads,
        num_hosts=num_hosts,
        slots=host.slots,
        secret=secret,
        exchange_interval_s=args.coordinator.exchange_interval_s,
        max_queued_tokens=host.max_queued_tokens,
        bytes_limit=host.weights_bytes,
        speed=host.speed,
        stop_timeout_s=args.placement.drain_timeout_s,
    )
