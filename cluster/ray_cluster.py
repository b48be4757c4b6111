"""What only Ray and Serve know of where we run."""

import os

import ray
from ray.serve.context import _get_global_client  # nothing public tells what a running Serve binds


def cluster_id() -> str:
    """The RayCluster's name where KubeRay tells it, which a restart of the cluster keeps; else Ray's own id of this cluster."""
    return os.environ.get("RAY_CLUSTER_NAME") or str(ray.get_runtime_context().gcs_address)


def http_host() -> str | None:
    """The address that Serve's HTTP binds; None where Serve has no proxies."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def has_haproxy() -> bool:
    """Whether HAProxy is Serve's ingress, in place of its Python proxy."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
