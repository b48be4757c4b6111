"""`shoal config`: the Serve config that `serve deploy` and KubeRay's serveConfigV2 take."""

from typing import Any

from cluster.config import ShoalConfig
from cluster.doors import GRPC_SERVICES, tls_options


def serve_config(config: ShoalConfig) -> dict[str, Any]:
    """One application at `/`, every value of the tree spelled out, the secret left to the deployment."""
    args = config.model_dump(mode="json", exclude={"security": {"secret"}})
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, **tls_options(config.security)},
        "grpc_options": {"port": 9000, "grpc_servicer_functions": GRPC_SERVICES},
        "applications": [{"name": config.name, "route_prefix": "/", "import_path": "cluster.app:build", "args": args}],
    }
