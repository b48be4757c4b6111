"""The host's side: hostile and broken peers, and what a router's end looks like from here."""

import contextlib
import errno
import logging
import os
import queue
import signal
import socket
import struct
import threading
import time
import zlib

import pytest
import torch

from router.errors import ChannelClosed, FrameError, HandshakeError
from router.transport import half_open, shared_memory
from router.transport import listener as listener_module
from router.transport.connect import connect
from router.transport.frames import MAGIC, SHARED, ExpertsAnswer, FrameKind, Header, pack_header
from router.transport.handshake import HELLO_BYTES, PROOF_BYTES, Handshake, Role
from router.transport.listener import Listener, ListenerLimits
from router.transport.payloads import encode_request, request_header
from tests.router.transport.processes import receive, start
from tests.router.transport.samples import assert_equal_requests, echo_partial, make_request


def echo(incoming):
    incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, FrameKind.PARTIAL, echo_partial(incoming.request)))


@pytest.fixture
def listen():
    listeners = []

    def listen(on_frame=echo, **options):
        listeners.append(Listener(b"secret", "app", "node-1", on_frame=on_frame, **options))
        return listeners[-1]

    yield listen
    for listener in listeners:
        listener.close()


def is_served(listener, node_id="node-1"):
    channel = connect(listener.endpoint, node_id, b"secret", "app")
    channel.send(1, 1, make_request())
    answer = receive(channel)
    channel.close()
    return answer.kind == FrameKind.PARTIAL


def raw_socket(listener, over="unix"):
    if over == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + listener.endpoint.unix_name)
    else:
        sock = socket.create_connection((listener.endpoint.tcp_host, listener.endpoint.tcp_port))
    sock.settimeout(10.0)
    return sock


def proved_socket(listener, over="tcp", role=Role.ROUTER, incarnation=5):
    """A socket through whose handshake we have come, to misbehave on."""
    sock = raw_socket(listener, over)
    steps = Handshake(b"secret", "app", role, "test", incarnation).as_client()
    sock.sendall(next(steps))
    next(steps)
    sock.sendall(steps.send(sock.recv(HELLO_BYTES, socket.MSG_WAITALL)))
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(sock.recv(PROOF_BYTES, socket.MSG_WAITALL))
    return sock


def is_cut_off(sock):
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    sock.close()
    return True  # else the socket's time-out has raised


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 500, b"\xff" * 500, MAGIC + bytes(500)])
def test_who_speaks_another_language_is_cut_off_and_told_nothing(listen, over, words):
    listener = listen()
    sock = raw_socket(listener, over)
    sock.sendall(words)
    with contextlib.suppress(ConnectionError):
        assert sock.recv(100) == b""
    sock.close()
    assert is_served(listener)


def test_wrong_proof_gets_no_proof(listen):
    listener = listen()
    sock = raw_socket(listener)
    steps = Handshake(b"guess", "app", Role.ROUTER, "test", 5).as_client()
    sock.sendall(next(steps))
    next(steps)
    sock.sendall(steps.send(sock.recv(HELLO_BYTES, socket.MSG_WAITALL)))
    assert sock.recv(PROOF_BYTES) == b""
    sock.close()


def test_silent_and_slow_peers_delay_nobody_and_are_dropped_in_time(listen):
    listener = listen(limits=ListenerLimits(handshake_timeout_s=0.3))
    silent = [raw_socket(listener, over) for over in ("unix", "tcp") * 3]
    silent[0].sendall(MAGIC)
    started = time.monotonic()
    assert is_served(listener)
    assert is_served(listener, "node-2")
    assert time.monotonic() - started < 5
    assert all(is_cut_off(sock) for sock in silent)


def test_room_is_made_for_the_newest_when_too_many_say_nothing(listen):
    listener = listen(limits=ListenerLimits(handshake_timeout_s=600.0, max_half_open=4))
    silent = [raw_socket(listener) for _ in range(12)]
    assert is_served(listener)
    for sock in silent[:8]:
        assert is_cut_off(sock)
    for sock in silent[8:]:
        sock.close()


REQUEST = b"".join(encode_request(5, 1, 1, make_request()))
HEADER = request_header(5, 1, 1, make_request())


@pytest.mark.parametrize(
    "broken",
    [
        b"\0" * 200,
        REQUEST[:-1] + bytes([REQUEST[-1] ^ 1]),
        pack_header(HEADER._replace(incarnation=6)),
        pack_header(HEADER._replace(flags=SHARED, offset=0)),
        pack_header(HEADER._replace(num_tokens=1 << 20, hidden_size=1 << 17)),
        pack_header(Header(FrameKind.PONG, 5)),
        pack_header(Header(FrameKind.MESSAGE, 5, length=1, payload_crc=zlib.crc32(b"x"))) + b"x",
    ],
    ids=["zeros", "payload", "other life", "shared over TCP", "sizes", "kind", "a gateway's frame"],
)
def test_broken_frame_costs_its_sender_the_channel_and_nobody_else(listen, broken):
    arrived = []
    listener = listen(arrived.append)
    sock = proved_socket(listener)
    sock.sendall(broken)
    assert is_cut_off(sock)
    assert not arrived
    listener.close()


def test_truncated_frame_then_the_end(listen):
    arrived = []
    listener = listen(lambda incoming: (arrived.append(incoming), echo(incoming)))
    sock = proved_socket(listener)
    sock.sendall(REQUEST[:-3])
    sock.shutdown(socket.SHUT_WR)
    assert is_cut_off(sock)
    assert is_served(listener)
    assert len(arrived) == 1


@pytest.mark.parametrize("offset", [1, 64 * 1000, 1 << 40, (1 << 64) - 64])
def test_place_outside_the_shared_buffer_costs_the_channel(listen, offset):
    arrived = []
    listener = listen(arrived.append)
    sock = proved_socket(listener, "unix")
    shared_memory.pass_buffer(sock, 1 << 12)
    sock.sendall(pack_header(HEADER._replace(flags=SHARED, offset=offset)))
    assert is_cut_off(sock)
    assert not arrived


def test_request_over_the_socket_where_a_buffer_is_shared_costs_the_channel(listen):
    listener = listen()
    sock = proved_socket(listener, "unix")
    shared_memory.pass_buffer(sock, 1 << 12)
    sock.sendall(REQUEST)
    assert is_cut_off(sock)


def attach(sock, num_bytes, fds):
    socket.send_fds(sock, [struct.pack("<4sQ", MAGIC, num_bytes)], fds)


def test_buffers_that_could_fault_are_refused(listen, tmp_path):
    listener = listen(limits=ListenerLimits(max_shared_bytes=1 << 30))
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(4096)
        for num_bytes, fds in (
            (4096, []),
            (4096, [unsealed]),
            (4096, [file.fileno()]),
            (8192, [unsealed]),
            (0, [unsealed]),
            (1 << 40, [unsealed]),
            (4096, [unsealed, unsealed]),
        ):
            sock = proved_socket(listener, "unix")
            attach(sock, num_bytes, fds)
            assert is_cut_off(sock)
    os.close(unsealed)
    assert is_served(listener)


def test_refused_buffers_leave_no_descriptor_open(listen):
    listener = listen()
    unsealed = os.memfd_create("unsealed")
    for _ in range(3):
        sock = proved_socket(listener, "unix")
        attach(sock, 4096, [unsealed])
        assert is_cut_off(sock)
    assert is_served(listener)
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    assert sum("unsealed" in link for link in links) == 1
    os.close(unsealed)


def test_request_arrives_as_sent_and_channels_have_ids(listen):
    arrived = queue.SimpleQueue()
    listener = listen(arrived.put)
    for node_id in ("node-1", "node-2"):
        channel = connect(listener.endpoint, node_id, b"secret", "app")
        request = make_request(dtype=torch.bfloat16, is_prefill=True)
        channel.send(3, 2, request)
        incoming = arrived.get(timeout=10)
        assert (incoming.sequence, incoming.attempt) == (3, 2)
        assert_equal_requests(incoming.request, request)
        assert incoming.channel_id == (1 if node_id == "node-1" else 2)
        channel.close()


@pytest.mark.parametrize("node_id", ["node-1", "node-2"])
def test_answers_of_the_wrong_shape_are_the_host_s_bug_and_answers_count_once(listen, node_id):
    arrived = queue.SimpleQueue()
    listener = listen(arrived.put)
    channel = connect(listener.endpoint, node_id, b"secret", "app")
    channel.send(1, 1, make_request())
    incoming = arrived.get(timeout=10)
    with pytest.raises(FrameError, match=r"\[3, 4\] for \[3, 5\]"):
        incoming.answer(ExpertsAnswer(1, 1, FrameKind.PARTIAL, torch.zeros(3, 4)))
    with pytest.raises(AssertionError):
        incoming.answer(ExpertsAnswer(2, 1, FrameKind.BUSY))
    echo(incoming)
    echo(incoming)
    assert receive(channel).kind == FrameKind.PARTIAL
    channel.send(2, 1, make_request())
    echo(arrived.get(timeout=10))
    assert receive(channel).sequence == 2
    channel.close()


def test_gone_router_cancels_its_frames_and_takes_answers_in_silence(listen):
    arrived = queue.SimpleQueue()
    listener = listen(arrived.put)
    for node_id in ("node-1", "node-2"):
        channel = connect(listener.endpoint, node_id, b"secret", "app")
        channel.send(1, 1, make_request())
        incoming = arrived.get(timeout=10)
        assert not incoming.cancelled()
        channel.close()
        wait_until(incoming.cancelled)
        echo(incoming)


def test_killed_router_is_seen_at_once(listen):
    arrived = queue.SimpleQueue()
    listener = listen(arrived.put)
    endpoint = listener.endpoint
    for node_id in ("node-1", "node-2"):
        program = (
            "import sys;from router.placement_map import Endpoint;from router.transport.connect import connect;"
            "from tests.router.transport.samples import make_request;"
            f"c=connect(Endpoint('node-1','{endpoint.unix_name}','{endpoint.tcp_host}',{endpoint.tcp_port}),'{node_id}',b'secret','app');"
            "c.send(1,1,make_request());sys.stdin.read()"
        )
        process = start("-c", program)
        incoming = arrived.get(timeout=60)
        assert not incoming.cancelled()
        process.send_signal(signal.SIGKILL)
        wait_until(incoming.cancelled)
        echo(incoming)
        process.communicate(timeout=30)


def test_callback_that_raises_fails_its_frame_only(listen, caplog):
    def on_frame(incoming):
        if incoming.request.layer == 13:
            raise KeyError("layer 13")
        echo(incoming)

    listener = listen(on_frame)
    channel = connect(listener.endpoint, "node-1", b"secret", "app")
    with caplog.at_level(logging.CRITICAL, logger="shoal"):
        channel.send(1, 1, make_request(layer=13))
        failed = receive(channel)
    assert failed.kind == FrameKind.FAILED
    assert "layer 13" in failed.reason
    channel.send(2, 1, make_request())
    assert receive(channel).kind == FrameKind.PARTIAL
    channel.close()


def test_past_the_limit_of_waiting_frames_the_answer_is_busy(listen):
    arrived = queue.SimpleQueue()
    listener = listen(arrived.put, limits=ListenerLimits(max_waiting_frames=2))
    channel = connect(listener.endpoint, "node-2", b"secret", "app")
    for sequence in (1, 2, 3):
        channel.send(sequence, 1, make_request())
    busy = receive(channel)
    assert (busy.sequence, busy.kind) == (3, FrameKind.BUSY)
    channel.close()


def test_gateway_is_refused_where_only_routers_are_served(listen):
    listener = listen()
    sock = raw_socket(listener)
    sock.sendall(next(Handshake(b"secret", "app", Role.GATEWAY, "test", 5).as_client()))
    assert sock.recv(100) == b""
    sock.close()


def test_close_ends_thread_channels_and_sockets(listen):
    listener = listen(lambda incoming: None)
    channels = [connect(listener.endpoint, node_id, b"secret", "app") for node_id in ("node-1", "node-2")]
    half_open = raw_socket(listener)
    listener.close()
    listener.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "channels"]
    for channel in channels:
        with pytest.raises(ChannelClosed):
            receive(channel)
    assert is_cut_off(half_open)
    for node_id in ("node-1", "node-2"):
        with pytest.raises((ChannelClosed, HandshakeError)):
            connect(listener.endpoint, node_id, b"secret", "app")


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), RuntimeError("unforeseen")])
def test_buffer_that_cannot_be_mapped_costs_its_router_the_channel_and_nobody_else(listen, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    listener = listen()
    monkeypatch.setattr(half_open, "map_buffer", fail)
    sock = proved_socket(listener, "unix")
    with caplog.at_level(logging.CRITICAL, logger="shoal"):
        shared_memory.pass_buffer(sock, 1 << 12)
        assert is_cut_off(sock)
    assert is_served(listener, "node-2")
    assert listener.is_alive


@pytest.mark.parametrize("part", ["HalfOpen", "HostEnd"])
def test_peer_that_cannot_be_taken_in_is_cut_off_and_the_next_is_served(listen, monkeypatch, caplog, part):
    real = getattr(listener_module, part)
    failures = [RuntimeError("unforeseen")]

    def fail_once(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    listener = listen()
    monkeypatch.setattr(listener_module, part, fail_once)
    with caplog.at_level(logging.CRITICAL, logger="shoal"), pytest.raises((ChannelClosed, HandshakeError)):
        is_served(listener, "node-2")
    assert is_served(listener, "node-2")
    assert listener.is_alive
    listener.close()
    assert not listener.is_alive


def test_tcp_address_that_is_not_ours_is_an_error():
    with pytest.raises(OSError, match="assign"):
        Listener(b"secret", "app", "node-1", tcp_host="203.0.113.1")


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
