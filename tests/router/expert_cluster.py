"""A cluster in one process: experts, hosts that hold some of them, and the map that says so."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from model.experts import ExpertSlots, ExpertWeights, LocalExperts
from model.gate import Routing
from model.logical_expert import LogicalExpert
from router.dispatch import DispatchLimits, DistributedExperts
from router.errors import ChannelRefused
from router.expert_server import ExpertServer, ServerLimits
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap
from router.transport.channel import Incoming
from router.transport.frames import ExpertsAnswer, FrameKind
from router.transport.heartbeat import HeartbeatLimits
from router.transport.memory import Faults, MemoryChannel, MemoryHost

HIDDEN = 8
LAYERS = (1, 3)
# Nothing in these tests is meant to wait this long; a wait that should end by itself and does not fails by it.
LIMITS = DispatchLimits(step_timeout_s=20.0, reconnect_interval_s=0.02, look_interval_s=0.02)


def make_experts(num_experts: int, seed: int = 0, layers: Iterable[int] = LAYERS) -> dict[LogicalExpert, ExpertWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        LogicalExpert(layer, expert): ExpertWeights(
            torch.randn(12, HIDDEN, generator=generator) / 3, torch.randn(HIDDEN, 6, generator=generator) / 2
        )
        for layer in layers
        for expert in range(num_experts)
    }


def make_batch(num_tokens: int, num_experts: int, top_k: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, expert_ids = scores.topk(top_k, dim=1)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype), Routing(expert_ids, weights)


def key(name: str, incarnation: int = 1) -> HostKey:
    return HostKey(name, incarnation)


def make_map(held: Mapping[HostKey, Iterable[LogicalExpert]], n: int = 1, epoch: int = 1) -> PlacementMap:
    expert_to_hosts: dict[LogicalExpert, tuple[HostKey, ...]] = {}
    for host, experts in held.items():
        for expert in experts:
            expert_to_hosts[expert] = (*expert_to_hosts.get(expert, ()), host)
    return PlacementMap(MapVersion(epoch, n), {host: Endpoint("node", host.replica_id, "127.0.0.1", 1) for host in held}, expert_to_hosts)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


@dataclass
class Host:
    """`on_frame` may be replaced by a test; `frames` keeps every frame that came; a host that is down refuses channels."""

    memory: MemoryHost
    server: ExpertServer
    slots: ExpertSlots
    faults: Faults = field(default_factory=Faults)
    frames: list[Incoming] = field(default_factory=list)
    channels: list[MemoryChannel] = field(default_factory=list)
    is_down: bool = False
    max_frames: int = 64
    heartbeat: HeartbeatLimits | None = None

    def die(self) -> None:
        self.is_down = True
        self.memory.disconnect()


class Cluster:
    """Hosts by key; use it as a context, so that every thread ends."""

    def __init__(self, num_experts: int, seed: int = 0) -> None:
        self.experts = make_experts(num_experts, seed)
        self.local = LocalExperts(ExpertSlots(self.experts.items()))
        self.hosts: dict[HostKey, Host] = {}
        self._routers: list[DistributedExperts] = []

    def add_host(self, host_key: HostKey, experts: Iterable[LogicalExpert], limits: ServerLimits | None = None) -> Host:
        slots = ExpertSlots((expert, self.experts[expert]) for expert in experts)
        server = ExpertServer(slots, limits)
        host = self.hosts[host_key] = Host(MemoryHost(lambda incoming: None), server, slots)

        def on_frame(incoming: Incoming) -> None:
            host.frames.append(incoming)
            server.on_frame(incoming)

        host.memory.on_frame = on_frame
        return host

    def open_channel(self, host_key: HostKey, endpoint: Endpoint) -> MemoryChannel:
        host = self.hosts.get(host_key)
        if host is None or host.is_down:
            raise ChannelRefused("connection refused")
        host.channels.append(host.memory.connect(host.faults, host.max_frames, host.heartbeat))
        return host.channels[-1]

    def map(self, n: int = 1, epoch: int = 1) -> PlacementMap:
        """What the living hosts hold."""
        return make_map({host_key: sorted(host.slots.held()) for host_key, host in self.hosts.items() if not host.is_down}, n, epoch)

    def router(self, latest_map: Callable[[], PlacementMap | None] = lambda: None, limits: DispatchLimits = LIMITS) -> DistributedExperts:
        self._routers.append(DistributedExperts(self.open_channel, latest_map, limits))
        return self._routers[-1]

    def expected(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.local.combine(self.local.dispatch(layer, hidden, routing))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for router in self._routers:
            router.close()
        for host in self.hosts.values():
            host.server.close()


def refuse(kind: FrameKind, reason: str = "") -> Callable[[Incoming], None]:
    """A host that answers every frame so."""

    def on_frame(incoming: Incoming) -> None:
        incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, kind, None, reason))

    return on_frame


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 additions, or one rounding of a shorter type."""
    assert actual.dtype == expected.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
