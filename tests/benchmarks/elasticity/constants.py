"""Every number that the simulation assumes, with its source. All but `Policy` were chosen before the first result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V2-Lite shape: what the expert traces were recorded on, and its published configuration in bfloat16."""

    num_layers: int = 26
    num_experts: int = 64
    top_k: int = 6
    expert_bytes: int = 3 * 2048 * 1408 * 2
    # Per layer q 6.3 M, kv_a 1.2 M, kv_b 2.1 M, o 4.2 M, shared experts 17.3 M parameters, times 27 layers; the head is read once a step.
    dense_bytes: int = 2 * (27 * 31_100_000 + 210_000_000)
    dense_flop_per_token: float = 2 * 27 * 31_100_000
    attention_flop_per_pair: float = 2 * 16 * (192 + 128) * 27  # one token against one position before it
    kv_bytes_per_token: int = 27 * (512 + 64) * 2


@dataclass(frozen=True)
class Device:
    """One node is one device, the same for routers and hosts; the class of a 24 GB inference card.

    A float32 expert call on the 2-core CPU we measured costs alpha 5 ms for each activated expert and beta 0.2 ms for each token.
    The same ratio at `scale` of the time reads an expert's 17.3 MB at 0.69 TB/s and computes 17.3 TFLOP/s.
    """

    scale: float = 1 / 200
    cpu_alpha_s: float = 5e-3
    cpu_beta_s: float = 0.2e-3
    flop_per_s: float = 17.3e12
    bytes_per_s: float = 0.69e12
    memory_bytes: int = 20_000_000_000  # of 24 GB, what is left for weights and KV
    hop_s: float = (
        0.2e-3  # dispatch and combine of one layer: shared memory 0.15 ms and TCP 0.4 ms on the CPU we measured, DeepEP 0.2 to 0.5 ms
    )

    @property
    def alpha_s(self) -> float:
        return self.cpu_alpha_s * self.scale

    @property
    def beta_s(self) -> float:
        return self.cpu_beta_s * self.scale


@dataclass(frozen=True)
class Cluster:
    """Node start: a common figure for a cloud node with a cached image. A node is paid from the request for it until it is released."""

    node_start_s: float = 60.0
    replica_start_s: float = 5.0  # process and imports: Serve went from 2 to 4 empty replicas in 5.6 s on the machine we measured
    load_bytes_per_s: float = 2e9  # weights from local disk or page cache
    release_s: float = 60.0  # an idle node before Ray's autoscaler lets it go


@dataclass(frozen=True)
class Engine:
    """Of the product's defaults, the step is smaller: 512 prompt tokens take this device 75 ms, and a decode waits for its step."""

    max_batch_tokens: int = 512
    max_running: int = 128
    front_s: float = 0.02  # HTTP, tokenising, the channel to the router


@dataclass(frozen=True)
class Replay:
    """The trace is 57 minutes of one service, in bursts of seconds with minutes of silence between them.

    Its hour stands for a day: times are stretched, and each request comes `copies` times within the second (stretched as well) after
    it, so that the rate stays the trace's own. Nothing is smoothed beyond that second.
    """

    stretch: float = 24.0
    copies: int = 24
    plays: int = 1  # how often each minute is played in a row, at its own speed: another way to make a day of an hour
    seed: int = 0


@dataclass(frozen=True)
class Targets:
    """99 of 100 requests: first token, and mean time of the tokens after it."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


@dataclass(frozen=True)
class Placement:
    """64 experts a layer in 128 slots; the first half of the day routes as `law`, the second as `translation`."""

    min_replicas: int = 1
    redundancy: float = 1.0
    replan_s: float = 60.0  # after the topic turned, the old plan serves this long


@dataclass(frozen=True)
class Policy:
    """What an operator would configure for this trace, tried out on it as the fixed fleet's size is: a choice, not an assumption.

    Bursts rise by several times within a minute, the time that a node takes to start: so targets are low (each busy share in a burst's
    beginning stands for a few times as much in its middle), and nodes go soon after.
    """

    control_s: float = 5.0  # Serve decides ten times a second on means of 1 s: this is coarser
    reaction_s: float = 0.0  # one control interval is reaction enough
    cooldown_s: float = 150.0
    headroom: float = 0.0  # the low targets are headroom
    tolerance: float = 0.1
    host_busy: float = 0.25
    host_queue_wait_s: float = 0.002  # of a frame's service of 0.2 to 1.5 ms
    router_busy: float = 0.4
    router_kv_use: float = 0.7
    router_waiting_tokens: float = 4096.0
    max_growth: float = 2.0
    # Of the fixed fleet's: in the highest bursts hosts help, while routers that hosts cannot keep up with make every step wait.
    most_hosts: float = 1.2
    most_routers: float = 1.0


@dataclass(frozen=True)
class Constants:
    """All of them."""

    model: Model = Model()
    device: Device = Device()
    cluster: Cluster = Cluster()
    engine: Engine = Engine()
    replay: Replay = Replay()
    targets: Targets = Targets()
    placement: Placement = Placement()
    policy: Policy = Policy()
