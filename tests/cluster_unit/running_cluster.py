"""A whole front door over a real Coordinator with made-up members, which go on whenever somebody asks how an operation is."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import uvicorn

from cluster.api.control import ClusterControl
from cluster.api.http import http_app
from cluster.config import AutoscalingSettings, HostScalingSettings, RouterScalingSettings
from cluster.coordinator import Coordinator
from cluster.coordinator_limits import CoordinatorLimits
from model.logical_expert import LogicalExpert
from tests.cluster_unit.front_door import NearCoordinator, make_service, says
from tests.cluster_unit.made_up_members import Clock, Host, Router

EXPERTS = [LogicalExpert(layer, expert) for layer in (1, 2) for expert in range(8)]
SCALING = AutoscalingSettings(
    expert_host=HostScalingSettings(min_replicas=2, max_replicas=4, ceiling=8), router=RouterScalingSettings(min_replicas=1, max_replicas=2)
)


class RunningCluster(NearCoordinator):
    """Three hosts of 12 slots, a router, and load on every expert. Each second of the clock is a round of reports."""

    def __init__(self, operation_timeout_s: float = 600.0, num_hosts: int = 3) -> None:
        self.clock = Clock()
        limits = CoordinatorLimits(num_hosts=num_hosts, num_routers=1, operation_timeout_s=operation_timeout_s)
        super().__init__(Coordinator(EXPERTS, limits, self.clock, wall_clock=lambda: 1e9 + self.clock.now))
        self.hosts = [Host(f"host-{name}", slots=12, expert_bytes=2**20) for name in "abc"[:num_hosts]]
        self.router = Router("router-a")
        self.tokens = {expert: 10 * (1 + expert.expert) for expert in EXPERTS}
        self.is_moving = True
        self.rounds(6)

    def rounds(self, num: int = 1) -> None:
        for _ in range(num):
            for host in self.hosts:
                host.report = replace(host.report, stats={"busy_s": 0.5, "queue_wait_s": 0.1, "num_frames": 50, "num_tokens": 100})
                host.exchange(self.coordinator)
            self.router.exchange(self.coordinator, expert_tokens=self.tokens, stats={"num_running": 4.0, "kv_use": 0.25})
            self.clock.now += 1

    def overload(self, host: Host) -> None:
        """All load turns to what this host holds."""
        self.tokens = dict.fromkeys(host.ready, 1000)
        self.rounds(3)

    async def operation(self, operation_id):
        if self.is_moving:
            self.rounds()
        return await super().operation(operation_id)

    def control(self, autoscaling: AutoscalingSettings | None = SCALING) -> ClusterControl:
        return ClusterControl(self, autoscaling)


@contextlib.contextmanager
def listening(control: ClusterControl) -> Iterator[str]:
    """The front door on a port of its own; its address."""
    service, _ = make_service(None, says([5]))
    app = http_app(service, control, lambda: True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
