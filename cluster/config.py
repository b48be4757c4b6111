"""One configuration tree: frozen, unknown keys refused, read once at the edge. Flags over file over defaults."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import ConfigError
from cluster.guard.keys import ApiKey

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Branch(BaseModel):
    """One branch of the tree: frozen, and an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Branch):
    """Which checkpoint, and in which precision on which device."""

    path: str = Field(description="Directory with config.json, safetensors and tokenizer, the same on every node.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: PositiveInt | None = Field(default=None, description="Tokens of prompt and answer together; None: the checkpoint's own.")


class RouterSettings(Branch):
    """The gating router: dense part, KV cache, batching."""

    replicas: PositiveInt = 1
    gpus: Fraction = Field(default=1.0, description="GPUs of one router, where the device is cuda.")
    cpus: Fraction = Field(default=0.2, description="CPUs that Ray sets aside for one router; it does not bound its threads.")
    threads: PositiveInt | None = Field(
        default=None,
        description="Threads; None: the node's cores, less one for each host there that computes. In 16 bits on a CPU: half of them.",
    )
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources that choose its nodes.")
    page_size: PositiveInt = Field(default=16, description="Tokens of one KV page.")
    kv_cache_bytes: PositiveInt | None = Field(default=None, description="None: 1 GiB on a CPU, 80 % of what is free on a GPU.")
    max_batch_tokens: PositiveInt = Field(default=2048, description="Tokens of one step, decodes and prefill chunks together.")
    prefill_chunk: PositiveInt = Field(default=512, description="Most prompt tokens of one sequence in one step.")
    max_running: PositiveInt = Field(default=128, description="Sequences of one step.")
    max_waiting: PositiveInt = Field(default=512, description="Requests that wait for a place; past it clients get 429.")
    drain_timeout_s: Annotated[float, Field(ge=5, allow_inf_nan=False)] = Field(
        default=60.0, description="How long a router that Serve stops may take to finish its answers; then others go on with them."
    )
    step_timeout_s: PositiveFloat = Field(default=30.0, description="How long a step waits for a missing expert before its requests fail.")


class ExpertHostSettings(Branch):
    """The hosts of routed experts."""

    replicas: Annotated[int, Field(ge=0)] = Field(default=2, description="0 for a dense model.")
    gpus: Fraction = Field(default=1.0, description="GPUs of one host, where the device is cuda.")
    cpus: Fraction = Field(default=0.2, description="CPUs that Ray sets aside for one host; it does not bound its threads.")
    threads: PositiveInt | None = Field(default=None, description="Threads; None: the node's cores shared among the hosts.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources that choose its nodes.")
    slots: PositiveInt | None = Field(
        default=None,
        description="Experts of one host, over all layers; it takes one more while full hosts swap. None: no limit.",
    )
    weights_bytes: PositiveInt | None = Field(default=None, description="Bytes of experts that one host may hold; None: no limit.")
    speed: PositiveFloat = Field(default=1.0, description="Load that one host can carry, beside other hosts.")
    max_queued_tokens: PositiveInt = Field(default=65536, description="Tokens that wait at one host; past it routers are told BUSY.")


class GatewaySettings(Branch):
    """The front door."""

    replicas: PositiveInt = 1
    cpus: Fraction = 0.1
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources that choose its nodes.")
    max_ongoing_requests: PositiveInt = Field(default=2000, description="Open requests of one gateway.")
    default_timeout_s: PositiveFloat = Field(default=600.0, description="Deadline of a request that names none.")
    max_timeout_s: PositiveFloat = Field(
        default=3600.0, description="Longest deadline that a client may ask for, and so the longest life of a stream."
    )
    max_body_bytes: PositiveInt = Field(
        default=1 << 24, description="Of one HTTP body; past it 413. `shoal serve` bounds gRPC messages by it too."
    )
    body_timeout_s: PositiveFloat = Field(default=30.0, description="How long an HTTP body may take to arrive; past it 408.")
    max_prompt_bytes: PositiveInt = Field(default=1 << 21, description="Text of one call's prompts, before it is tokenized.")
    max_prompt_tokens: PositiveInt | None = Field(default=None, description="Of one prompt; None: what the model takes.")
    max_answers: PositiveInt = Field(default=128, description="Of one call: prompts x n.")
    start_timeout_s: PositiveFloat = Field(default=1800.0, description="How long a gateway waits for experts and routers at its start.")
    drain_timeout_s: PositiveFloat = Field(
        default=5.0, description="How long a gateway that Serve stops may take to finish its streams; more where nodes come and go."
    )


class CoordinatorSettings(Branch):
    """The control loop."""

    cpus: Fraction = 0.1
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources that choose its nodes.")
    exchange_interval_s: PositiveFloat = Field(default=1.0, description="How often a member reports.")
    lease_s: PositiveFloat = Field(default=5.0, description="How long a member counts as alive after its last report.")
    short_window_s: PositiveFloat = Field(default=5.0, description="Load for status and repair: t seconds ago weighs exp(-t / this).")
    long_window_s: PositiveFloat = Field(default=60.0, description="Load for placement, likewise.")
    operation_timeout_s: PositiveFloat = Field(default=600.0, description="An operator's request that takes longer is rolled back.")


class PlacementSettings(Branch):
    """Where experts stand."""

    min_replicas: PositiveInt = Field(default=1, description="Hosts that hold each expert, on nodes apart where there are; 2 to lose none.")
    redundancy: Fraction = Field(default=0.0, description="Copies of hot experts beyond that, as a share of a layer's experts.")
    min_gain: Fraction = Field(
        default=0.01, description="Balancedness, beyond chance, that a layer must gain before anything of it moves, ..."
    )
    min_gain_per_layer: Fraction = Field(default=0.3, description="... and more by this x the share of the layer's bytes that move.")
    rebalance_interval_s: PositiveFloat = Field(default=30.0, description="How often the balance is looked at.")
    rescue_grace_s: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="How long experts that no reachable host holds wait before the other hosts load them."
    )
    orphan_grace_s: PositiveFloat = Field(
        default=20.0, description="How long a lost host's replacement is waited for before the other hosts make up for its replicas."
    )
    drain_timeout_s: Annotated[float, Field(ge=5, allow_inf_nan=False)] = Field(
        default=300.0, description="How long a host that Serve stops may take to hand over its experts."
    )


class StateStoreSettings(Branch):
    """What outlives the Coordinator: without a URL its memory ends with it, and members' reports stand in."""

    redis_url: str | None = Field(
        default=None,
        repr=False,
        pattern=r"^rediss?://",
        description="redis://user:password@host:port/db, or rediss:// for TLS with ?ssl_ca_certs=FILE. "
        "A password that is left out is the variable SHOAL_REDIS_PASSWORD.",
    )
    application: str | None = Field(default=None, min_length=1, description="First part of the key; None: the application's name.")
    cluster: str | None = Field(
        default=None, min_length=1, description="Second part; None: RAY_CLUSTER_NAME where KubeRay sets it, else the address of Ray's head."
    )


class ScalingSettings(Branch):
    """Bounds and pace of one role that follows its load."""

    min_replicas: PositiveInt = Field(default=1, description="Fewer never run, whatever is asked at run time.")
    max_replicas: PositiveInt = Field(default=4, description="More are not started, unless an operator raises it at run time.")
    ceiling: PositiveInt | None = Field(default=None, description="What max_replicas can be raised to at run time; None: four times it.")
    reaction_s: Annotated[float, Field(ge=0)] = Field(default=1.0, description="How long a need must last before replicas are added.")
    cooldown_s: PositiveFloat = Field(default=60.0, description="Replicas go when none of this time's needs asks for them.")
    headroom: Fraction = Field(default=0.1, description="Kept above the need when replicas go, as a share.")
    tolerance: Fraction = Field(default=0.1, description="A need above the replicas by less than this share adds none.")

    @property
    def ceiling_replicas(self) -> int:
        """Serve's own bound, which nothing at run time exceeds."""
        return self.ceiling if self.ceiling is not None else 4 * self.max_replicas

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if not self.min_replicas <= self.max_replicas <= self.ceiling_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} <= max_replicas {self.max_replicas} <= ceiling {self.ceiling} must hold")
        return self


class HostScalingSettings(ScalingSettings):
    """Expert hosts, on expert load."""

    busy: PositiveFloat = Field(default=0.6, le=1, description="Target share of the time that a host computes.")
    queue_wait_s: PositiveFloat = Field(default=0.05, description="Target of the mean time that a frame waits at a host.")
    max_growth: PositiveFloat = Field(default=2.0, ge=1, description="A queue asks for at most this many times the hosts that serve.")


class RouterScalingSettings(ScalingSettings):
    """Routers, on KV cache and queue."""

    kv_use: PositiveFloat = Field(default=0.7, le=1, description="Target share of KV pages in use.")
    busy: PositiveFloat = Field(default=0.7, le=1, description="Target share of the time that a router is in a step.")
    waiting_tokens: PositiveFloat = Field(default=4096.0, description="Target of prompt tokens that wait at one router.")
    num_waiting: PositiveFloat = Field(default=4.0, description="Target of requests that wait, where tokens are not told.")
    max_growth: PositiveFloat = Field(default=2.0, ge=1, description="A queue asks for at most this many times the routers there are.")


class GatewayScalingSettings(ScalingSettings):
    """Gateways, on open requests."""

    ongoing_requests: PositiveFloat = Field(default=200.0, description="Target of open requests of one gateway.")


class AutoscalingSettings(Branch):
    """Which roles follow their load; one without a branch keeps the number of replicas of its own section."""

    expert_host: HostScalingSettings | None = None
    router: RouterScalingSettings | None = None
    gateway: GatewayScalingSettings | None = None
    metrics_interval_s: PositiveFloat = Field(default=0.5, description="How often replicas tell Serve their load; it is averaged over two.")


class SecuritySettings(Branch):
    """Who may speak to whom."""

    secret: str | None = Field(
        default=None,
        min_length=16,
        repr=False,
        description="Proof on the data plane; None: the variable SHOAL_SECRET, else drawn anew at every deploy.",
    )
    keys_file: str | None = Field(
        default=None,
        description="YAML with API keys, hashed, as `shoal keys new` writes it; read again when it changes. On every gateway's node.",
    )
    keys: tuple[ApiKey, ...] = Field(default=(), description="API keys, hashed, beside those of the file.")
    grpc_key: ApiKey | None = Field(default=None, description="What gRPC takes where no keys are configured; `shoal serve` draws it.")
    insecure: bool = Field(default=False, description="Without keys: whoever reaches the ports may use and operate the cluster.")
    open_metrics: bool = Field(default=True, description="/metrics without a key.")
    certificate_file: str | None = Field(
        default=None, description="PEM with the certificate and its chain: HTTP becomes HTTPS. Not with HAProxy."
    )
    certificate_key_file: str | None = Field(default=None, description="PEM with the certificate's private key.")

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> Self:
        if (self.certificate_file is None) != (self.certificate_key_file is None):
            raise ValueError("certificate_file and certificate_key_file go together")
        return self


class DashboardSettings(Branch):
    """What the dashboard knows beside the cluster itself: prices, without which it shows no cost."""

    price_per_host_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="What one expert host costs in an hour; None: no cost is shown."
    )
    price_per_router_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="What one router costs in an hour; None: as much as a host."
    )
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$", description="ISO 4217 code of these prices.")


class MetricsSettings(Branch):
    """What `/metrics` shows, and the log of requests."""

    per_expert: Annotated[int, Field(ge=0)] = Field(
        default=4096,
        description="Series of single experts, two each, where the model has at most this many in all; 0: never. Layers have theirs.",
    )
    log_requests: bool = Field(default=False, description="A JSON line at the end of every request: ids, lengths, seconds; never content.")


class TracingSettings(Branch):
    """OpenTelemetry; nothing is traced, and nothing paid, without an endpoint."""

    otlp_endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="OTLP over HTTP, such as http://collector:4318 (/v1/traces is added)."
    )
    share: float = Field(default=1.0, ge=0, le=1, description="Of requests without a traceparent; those that have one decide themselves.")
    dispatch_share: float = Field(
        default=0.01, ge=0, le=1, description="Of a router's steps with a traced request: a span for each layer's way to the experts."
    )


class ShoalConfig(Branch):
    """Everything that `shoal serve` and KubeRay's serveConfigV2 can say."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="The Serve application and the model id.")
    model: ModelSettings
    router: RouterSettings = RouterSettings()
    expert_host: ExpertHostSettings = ExpertHostSettings()
    gateway: GatewaySettings = GatewaySettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    placement: PlacementSettings = PlacementSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    state_store: StateStoreSettings = StateStoreSettings()
    security: SecuritySettings = SecuritySettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    dashboard: DashboardSettings = DashboardSettings()


def read_config(file: Path | None, flags: dict[str, Any]) -> ShoalConfig:
    """The tree from `file` (YAML) with `flags` ({"branch.key": value}; None is not given) laid over it.

    Raises ConfigError naming the key, the value and what is allowed.
    """
    tree = {} if file is None else _read_tree(file)
    for path, value in flags.items():
        if value is None:
            continue
        branch, _, key = path.rpartition(".")
        place = tree.setdefault(branch, {}) if branch else tree
        if not isinstance(place, dict):
            raise ConfigError(f"{branch} is {place!r}, but must be a mapping with keys such as `{key}:`")
        place[key] = value
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = os.path.abspath(os.path.expanduser(model["path"]))
        tree.setdefault("name", Path(model["path"]).name)
    security = tree.get("security")
    for key in ("keys_file", "certificate_file", "certificate_key_file"):
        if isinstance(security, dict) and isinstance(security.get(key), str):
            security[key] = os.path.abspath(os.path.expanduser(security[key]))
    try:
        return ShoalConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError("the configuration is not valid: " + "; ".join(lines)) from error


def _read_tree(file: Path) -> dict[str, Any]:
    """The file's branches; one that is there without a value is one that is not there."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the configuration {file} must be a mapping of branches such as `model:` and `router:`")
    return {key: branch for key, branch in tree.items() if branch is not None}
