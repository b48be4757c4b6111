"""HAProxy as Serve's ingress on a machine that others use too: its files in a directory, its ports free ones."""

from pathlib import Path

from tests.free_ports import free_port


def haproxy_environment(directory: Path) -> dict[str, str]:
    """For the environment in which Ray starts; in a pod, which has a disk and ports of its own, the first line does.

    `directory` has a short path: HAProxy's Unix sockets lie in it.
    """
    place = "RAY_SERVE_HAPROXY_"
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_FILE": "server-state",
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",
        f"{place}SERVER_STATE_BASE": str(directory),
        f"{place}METRICS_PORT": str(free_port()),
        f"{place}STATS_PORT": str(free_port()),
        **{f"{place}{name}": str(directory / file) for name, file in files.items()},
    }
