"""Opens a channel to a host: shared memory on the same node, TCP to another."""

import socket
import time

from router.errors import ChannelClosed, ChannelRefused, HandshakeError
from router.placement_map import Endpoint
from router.transport.channel import Channel, ChannelLimits
from router.transport.handshake import Handshake, Role, Steps, new_incarnation
from router.transport.shared_memory import SharedMemoryChannel, pass_buffer
from router.transport.tcp import TcpChannel, tune

Address = str | tuple[str, int]


def connect(endpoint: Endpoint, my_node_id: str, secret: bytes, application: str, limits: ChannelLimits | None = None) -> Channel:
    """A channel to the host that listens there; blocks for at most `limits.connect_timeout_s`.

    ChannelClosed if nobody answers there in time, ChannelRefused if nobody listens there, HandshakeError if who answers is not
    of our cluster and application.
    """
    limits = limits or ChannelLimits()
    deadline = time.monotonic() + limits.connect_timeout_s
    incarnation = new_incarnation()
    steps = Handshake(secret, application, Role.ROUTER, my_node_id, incarnation).as_client()
    sock, address = open_socket(endpoint, my_node_id)
    try:
        sock.settimeout(limits.connect_timeout_s)
        sock.connect(address)
        _shake_hands(sock, steps, deadline)
        if sock.family == socket.AF_UNIX:
            return SharedMemoryChannel(sock, incarnation, pass_buffer(sock, limits.shared_bytes), limits)
        return TcpChannel(sock, incarnation, limits)
    except OSError as error:
        sock.close()
        kind = ChannelRefused if isinstance(error, ConnectionRefusedError) else ChannelClosed
        raise kind(f"cannot reach {endpoint}: {error or type(error).__name__}") from error
    except BaseException:
        sock.close()
        raise


def open_socket(endpoint: Endpoint, my_node_id: str) -> tuple[socket.socket, Address]:
    """A socket that is not yet connected, and the address to connect it to."""
    if endpoint.node_id == my_node_id:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), "\0" + endpoint.unix_name
    family = socket.AF_INET6 if ":" in endpoint.tcp_host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    tune(sock)
    return sock, (endpoint.tcp_host, endpoint.tcp_port)


def _shake_hands(sock: socket.socket, steps: Steps, deadline: float) -> None:
    step = next(steps)
    try:
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            if isinstance(step, bytes):
                sock.sendall(step)
                step = next(steps)
            else:
                step = steps.send(_receive_exactly(sock, step, deadline))
    except StopIteration:
        return


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = sock.recv(num_bytes - len(received))
        if not chunk:
            raise HandshakeError("the host ended the handshake: it has another secret or application, or is closing")
        received += chunk
    return received
