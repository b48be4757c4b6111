"""Ports that are free now: suites run side by side on one machine."""

import socket


def free_port() -> int:
    """A TCP port that nobody held a moment ago, on every interface."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
