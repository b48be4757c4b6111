"""A real expert host and peers that do not know the cluster's secret: they are told nothing, and no expert computes for them."""

import contextlib
import json
import socket

import pytest

from router.errors import HandshakeError
from router.placement_map import Endpoint
from router.transport.connect import connect
from router.transport.handshake import HELLO_BYTES, Handshake, Role
from router.transport.payloads import encode_request
from tests.router.expert_process import APPLICATION, NODE, SECRET
from tests.router.transport.processes import receive, start
from tests.router.transport.samples import make_request

FRAMES = b"".join(encode_request(5, 1, 1, make_request()))
NODES = {"unix": NODE, "tcp": "another-node"}


@pytest.fixture(scope="module")
def endpoint():
    process = start("-m", "tests.router.expert_process", "4")
    try:
        yield Endpoint(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def raw_socket(endpoint, over):
    sock = socket.socket(socket.AF_UNIX if over == "unix" else socket.AF_INET)
    sock.settimeout(10.0)
    sock.connect("\0" + endpoint.unix_name if over == "unix" else (endpoint.tcp_host, endpoint.tcp_port))
    return sock


def heard(sock):
    """All that the host says until it hangs up."""
    said = b""
    with contextlib.suppress(ConnectionError), sock:
        while chunk := sock.recv(1 << 16):
            said += chunk
    return said


def is_served(endpoint, over):
    with contextlib.closing(connect(endpoint, NODES[over], SECRET, APPLICATION)) as channel:
        channel.send(1, 1, make_request())
        return receive(channel).sequence == 1


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("secret", [b"a secret of at least sixteen byteS", b"guess", SECRET[:-1]])
def test_a_peer_with_another_secret_gets_no_channel(endpoint, over, secret):
    with pytest.raises(HandshakeError):
        connect(endpoint, NODES[over], secret, APPLICATION)
    assert is_served(endpoint, over)


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("greeting", [b"", "hello", "proof of a guess"])
def test_frames_of_a_peer_that_has_not_proved_itself_are_answered_by_nothing(endpoint, over, greeting):
    sock = raw_socket(endpoint, over)
    steps = Handshake(b"guess", APPLICATION, Role.ROUTER, "stranger", 5).as_client()
    words = next(steps) if greeting else b""
    sock.sendall(words)
    if greeting == "proof of a guess":
        next(steps)
        sock.sendall(steps.send(sock.recv(HELLO_BYTES, socket.MSG_WAITALL)))
    with contextlib.suppress(ConnectionError):
        sock.sendall(FRAMES)
    said = heard(sock)
    assert len(said) in ((0, HELLO_BYTES) if greeting == "hello" else (0,)), "a greeting, but no proof and no answer"
    assert is_served(endpoint, over)
