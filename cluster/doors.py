"""Where the outside comes in: the ports we ask for, whether they are to be had, and those of a Serve that others started."""

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import SecuritySettings
from cluster.errors import ConfigError, StartError

GRPC_SERVICES = [
    "cluster.api.grpc_servicers.add_inference",
    "cluster.api.grpc_servicers.add_cluster",
    "cluster.api.grpc_servicers.add_health",
    "cluster.api.grpc_servicers.add_reflection",
]
EVERY_INTERFACE = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Doors:
    """`address` None: a Ray of our own. Raises ConfigError if both doors are one port."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 9000
    address: str | None = None

    def __post_init__(self) -> None:
        if self.http_port == self.grpc_port:
            raise ConfigError(f"--http-port and --grpc-port are both {self.http_port}: each needs a port of its own")


def check_ports(doors: Doors) -> None:
    """Raises StartError for a port that cannot be bound on this machine. Serve binds gRPC on every interface."""
    _check_port(doors.host, doors.http_port, "--http-port")
    _check_port("0.0.0.0", doors.grpc_port, "--grpc-port")


def doors_of(details: Mapping[str, Any], doors: Doors, node_id: str) -> Doors:
    """The doors of the Serve that runs already, from its `ServeInstanceDetails`; ours would be ignored there.

    `node_id` is this process's: of several proxies the near one is named. Raises StartError if that Serve has no gRPC of ours.
    """
    http, grpc = details.get("http_options") or {}, details.get("grpc_options") or {}
    missing = set(GRPC_SERVICES) - set(grpc.get("grpc_servicer_functions") or [])
    if missing:
        raise StartError(
            f"the Serve that runs at {doors.address} (--address) was started without Shoal's gRPC services: "
            f"start it with the grpc_options that `shoal config` prints, or let `shoal serve` start it"
        )
    host = http.get("host", doors.host)
    if host in EVERY_INTERFACE:
        proxies = details.get("proxies") or {}
        near: Mapping[str, Any] = proxies.get(node_id) or next(iter(proxies.values()), {})
        host = near.get("node_ip") or doors.host
    return replace(doors, host=host, http_port=http.get("port", doors.http_port), grpc_port=grpc.get("port", doors.grpc_port))


def tls_options(security: SecuritySettings) -> dict[str, Any]:
    """What Serve's HTTP options say of certificates, none for plain HTTP; the files lie on every proxy's node. Its gRPC has no TLS."""
    if security.certificate_file is None or security.certificate_key_file is None:
        return {}
    return {"ssl_certfile": security.certificate_file, "ssl_keyfile": security.certificate_key_file}


def check_tls(security: SecuritySettings, *, has_haproxy: bool) -> None:
    """Raises ConfigError for a certificate that would not be shown: HAProxy as Serve's ingress (2.60) speaks plain HTTP to everybody."""
    if has_haproxy and security.certificate_file is not None:
        raise ConfigError(
            "security.certificate_file: HAProxy as Serve's ingress has no TLS; terminate it before Serve, or leave "
            "RAY_SERVE_ENABLE_HA_PROXY out where Ray starts"
        )


def _check_port(host: str, port: int, flag: str) -> None:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"port {port} on {host} is taken ({error.strerror}): choose another with {flag}") from error
        if error.errno == errno.EACCES:
            raise StartError(f"port {port} on {host} is not ours to bind ({error.strerror}): choose another with {flag}") from error
        raise StartError(f"cannot bind {host} ({error.strerror}): give an address of this machine with --host") from error
