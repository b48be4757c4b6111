"""HAProxy as Serve's ingress, in place of its Python proxy. Serve is told by the environment in which Ray starts."""

import math
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from cluster.config import GatewaySettings, SecuritySettings
from cluster.errors import ConfigError

# Nobody has to take gateways of this one machine off a list before they may stop; Serve's own is 30 s.
_STOPS_AFTER_S = 1


def has_haproxy() -> bool:
    """Whether HAProxy is the ingress here."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def check_ingress(security: SecuritySettings) -> None:
    """Raises ConfigError for a certificate where the ingress is HAProxy: Serve's (2.60) speaks plain HTTP, whatever it is told."""
    if has_haproxy() and security.certificate_file is not None:
        raise ConfigError(
            "security.certificate_file: HAProxy as Serve's ingress has no TLS; terminate it before Serve, or serve without HAProxy"
        )


def use_haproxy(directory: Path, gateway: GatewaySettings, environment: MutableMapping[str, str] = os.environ) -> None:
    """For a Ray that this process will start; before anything of Ray is imported. What is in the environment already stays.

    `directory` is for HAProxy's own files, with a short path: a Unix socket is among them. Its figures, without a word of requests,
    are on two ports that it binds on every interface.
    """
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state", "SERVER_STATE_BASE": ""}
    with socket.socket() as metrics, socket.socket() as stats:  # open at the same time, so that they differ
        ports = {"METRICS_PORT": _bound_port(metrics), "STATS_PORT": _bound_port(stats)}
    bounds = {
        "HARD_STOP_AFTER_S": math.ceil(gateway.max_timeout_s),
        "H2_FE_MAX_CONCURRENT_STREAMS": gateway.max_ongoing_requests,
    }
    wanted = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_STOPS_AFTER_S),
        **{f"RAY_SERVE_HAPROXY_{name}": str(directory / file) for name, file in files.items()},
        **{f"RAY_SERVE_HAPROXY_{name}": str(number) for name, number in (ports | bounds).items()},
    }
    for name, value in wanted.items():
        environment.setdefault(name, value)


def _bound_port(probe: socket.socket) -> int:
    probe.bind(("", 0))
    return int(probe.getsockname()[1])
