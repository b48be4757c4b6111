"""One Ray of two nodes for the whole session: the near one and the far one, which only TCP reaches."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster.app import build
from cluster.config import read_config
from cluster.doors import GRPC_SERVICES
from cluster.serving import announce_closing
from tests.free_ports import free_port

NEAR, FAR = {"near": 0.001}, {"far": 0.001}


@dataclass(frozen=True)
class App:
    """A running application: its name, its HTTP address, and the address and metadata of its gRPC."""

    name: str
    http: str
    grpc: str

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("application", self.name),)

    def view(self) -> dict[str, Any]:
        """The Coordinator's view."""
        return serve.get_deployment_handle("Coordinator", self.name).view.remote().result(timeout_s=10)


class Shoals:
    """Deploys applications on the session's cluster, and takes them down again."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self._http_port, self._grpc_port = http_port, grpc_port

    def app(self, name: str) -> App:
        """Where an application of that name is, or would be."""
        return App(name, f"http://127.0.0.1:{self._http_port}/{name}", f"127.0.0.1:{self._grpc_port}")

    @contextmanager
    def running(self, directory: Path, name: str, **flags: Any) -> Iterator[App]:
        """The checkpoint served as `name`; flags are the configuration's, `router__replicas=2` and so on."""
        settings = {
            "router.resources": NEAR,
            "expert_host.resources": NEAR,
            "security.insecure": True,
            **{key.replace("__", "."): value for key, value in flags.items()},
        }
        config = read_config(None, {"model.path": str(directory), "name": name, **settings})
        serve.run(build(config), name=name, route_prefix=f"/{name}", _local_testing_mode=False)
        try:
            yield self.app(name)
        finally:
            announce_closing(name)  # as `shoal serve` does: nobody then waits for others to take over
            serve.delete(name)


@pytest.fixture(scope="session")
def shoals() -> Iterator[Shoals]:
    with two_nodes_of_ray() as running:
        yield running


@contextmanager
def two_nodes_of_ray() -> Iterator[Shoals]:
    """A Ray and a Serve of our own, gone at the end."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"near": 100}, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=4, resources={"far": 100})
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        http_port, grpc_port = free_port(), free_port()
        serve.start(
            http_options=HTTPOptions(port=http_port),
            grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICES),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        yield Shoals(http_port, grpc_port)
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
