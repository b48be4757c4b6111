"""Deploys an application on a running Ray and ends, as `serve deploy` does: nothing here outlives it but what Ray runs.

python -m tests.cluster.deploy RAY_ADDRESS HTTP_PORT GRPC_PORT shoal.yaml

Its expert hosts are paced (`tests.cluster.paced`).
"""

import logging
import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster import app as application
from cluster.config import read_config
from cluster.doors import GRPC_SERVICES
from tests.cluster.paced import PacedExpertHost
from tests.cluster.ray_nodes import RayNodes
from tests.free_ports import free_port
from tests.tiny_models import write_tiny

DEPLOY_TIMEOUT_S = 150.0


def deploy(nodes: RayNodes, directory: Path, tree: dict[str, Any]) -> tuple[int, int]:
    """The tiny checkpoint with this configuration, in a process of its own; its ports for HTTP and gRPC."""
    checkpoint = write_tiny("v2-lite", directory / "v2-lite")
    file = directory / "shoal.yaml"
    file.write_text(yaml.safe_dump({**tree, "model": {"path": str(checkpoint)}}))
    http, grpc = free_port(), free_port()
    nodes.run([sys.executable, "-m", "tests.cluster.deploy", nodes.address, str(http), str(grpc), str(file)], DEPLOY_TIMEOUT_S)
    return http, grpc


def main(address: str, http_port: int, grpc_port: int, file: Path) -> None:
    """Returns when the application runs."""
    config = read_config(file, {})
    application.ExpertHostReplica = PacedExpertHost  # type: ignore[misc]  # the builder's own
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(host="0.0.0.0", port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICES),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    serve.run(application.build(config), name=config.name, route_prefix="/")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
