"""Reader, outbox and the router's stream, on socket pairs whose other end the test plays."""

import select
import socket
import threading
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ChannelClosed, ChannelFull, FrameError
from router.transport.channel import ChannelLimits
from router.transport.frame_reader import FrameReader
from router.transport.frames import ANSWER_KINDS, HEADER_BYTES, SHARED, ExpertsAnswer, FrameKind, Header, pack_header
from router.transport.host_stream import HostStream
from router.transport.outbox import Outbox
from router.transport.payloads import encode_answer, encode_request
from tests.router.transport.samples import make_request

INCARNATION = 5
KINDS = frozenset(FrameKind)


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield near, far


def message(payload):
    header = Header(FrameKind.MESSAGE, INCARNATION, length=len(payload), payload_crc=zlib.crc32(payload))
    return pack_header(header) + payload


def read_all(reader):
    frames = []
    while (some := reader.read()) is not None:
        frames += some
    return frames


@given(st.lists(st.integers(0, 40_000).map(lambda size: bytes([size % 251]) * size), max_size=6), st.data())
def test_frames_are_read_however_the_stream_is_cut(payloads, data):
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        reader = FrameReader(near, INCARNATION, KINDS, 1 << 20)
        stream = b"".join(map(message, payloads))
        frames = []
        while stream:
            cut = data.draw(st.sampled_from([1, 80, 84, 90, 5000, 50_000]))
            far.sendall(stream[:cut])
            stream = stream[cut:]
            frames += read_all(reader)
        assert [bytes(frame.payload) for frame in frames] == payloads
        far.close()
        with pytest.raises(ChannelClosed):
            reader.read()


@pytest.mark.parametrize(
    "broken",
    [
        b"GET / HTTP/1.1\r\n" * 10,
        pack_header(Header(FrameKind.PONG, INCARNATION + 1)),
        pack_header(Header(FrameKind.PING, INCARNATION)),
        pack_header(Header(FrameKind.FAILED, INCARNATION, length=3)) + b"abc",
        pack_header(Header(FrameKind.PONG, INCARNATION, payload_crc=9)),
        pack_header(
            Header(FrameKind.PARTIAL, INCARNATION, num_tokens=1, hidden_size=1, dtype=1, length=4, flags=SHARED, offset=64, payload_crc=1)
        ),
        pack_header(Header(FrameKind.PARTIAL, INCARNATION, num_tokens=1 << 20, hidden_size=1 << 17, dtype=1, length=1 << 39)),
    ],
    ids=["other protocol", "other life", "not the peer's kind", "payload checksum", "checksum of nothing", "checksum of shared", "huge"],
)
def test_broken_frames_end_the_reading(pair, broken):
    near, far = pair
    far.sendall(broken)
    with pytest.raises(FrameError):
        read_all(FrameReader(near, INCARNATION, ANSWER_KINDS | {FrameKind.PONG}, 1 << 20))


def test_truncated_frame_is_the_end_of_the_channel(pair):
    near, far = pair
    far.sendall(message(b"x" * 100)[:-1])
    far.close()
    reader = FrameReader(near, INCARNATION, KINDS, 1 << 20)
    with pytest.raises(ChannelClosed):
        read_all(reader)


def drain(sock, num_bytes):
    received = bytearray()
    while len(received) < num_bytes:
        received += sock.recv(1 << 20)
    return bytes(received)


def test_outbox_queues_what_the_socket_does_not_take_and_keeps_the_order(pair):
    near, far = pair
    outbox = Outbox(near, max_bytes=4 << 20)
    source = bytearray(b"a" * (3 << 20))
    outbox.write([source, b"b"])
    assert not outbox.is_empty
    source[:] = bytes(len(source))  # the caller's again
    outbox.write([b"c" * 10, b"", b"d"])
    with pytest.raises(ChannelFull):
        outbox.write([bytes(4 << 20)])
    received = b""
    while not outbox.is_empty:
        received += far.recv(1 << 20)
        outbox.flush()
    received += drain(far, (3 << 20) + 12 - len(received))
    assert received == b"a" * (3 << 20) + b"b" + b"c" * 10 + b"d"


def test_outbox_of_a_closed_peer(pair):
    near, far = pair
    far.close()
    with pytest.raises(ChannelClosed):
        Outbox(near, 100).write([b"x"])


def test_stream_gives_up_on_a_host_that_does_not_read(pair):
    stream = HostStream(pair[0], INCARNATION, ChannelLimits(send_timeout_s=0.1, max_queued_bytes=1 << 20))
    started = time.monotonic()
    stream.send([bytes(1 << 20)])
    with pytest.raises(ChannelClosed, match="not read"):
        stream.send([bytes(1 << 20)])
    assert time.monotonic() - started < 10
    with pytest.raises(ChannelClosed):
        stream.next_answer(is_owed=False)


def test_stream_writes_on_while_the_router_waits_for_its_descriptor(pair):
    """A big frame leaves in pieces though nobody sends again: the descriptor turns readable when there is room."""
    near, far = pair
    stream = HostStream(near, INCARNATION, ChannelLimits())
    frame = b"".join(encode_request(INCARNATION, 1, 1, make_request(512, 2048)))
    stream.send([frame])
    received = bytearray()
    while len(received) < len(frame):
        if select.select([far], [], [], 0)[0]:
            received += far.recv(1 << 20)
        else:
            assert select.select([stream], [], [], 10.0)[0]
            assert stream.next_answer(is_owed=True) is None
    assert received == frame
    assert not select.select([stream], [], [], 0)[0]
    stream.close()


def test_answers_read_while_writing_make_the_descriptor_readable(pair):
    near, far = pair
    stream = HostStream(near, INCARNATION, ChannelLimits(send_timeout_s=0.5, max_queued_bytes=1))
    answer = b"".join(encode_answer(INCARNATION, ExpertsAnswer(1, 1, FrameKind.BUSY, None, "no")))
    far.sendall(answer * 2)
    stream.send([bytes(8 << 20)])  # stays in the queue
    far.settimeout(5.0)
    reader = threading.Thread(target=drain, args=(far, (8 << 20) + 1))
    reader.start()
    stream.send([b"x"])
    reader.join()
    for _ in range(2):
        assert select.select([stream], [], [], 0)[0]
        assert stream.next_answer(is_owed=True).header.kind == FrameKind.BUSY
    assert stream.next_answer(is_owed=True) is None
    assert not select.select([stream], [], [], 0)[0]
    stream.close()


def test_stream_closes_on_a_broken_answer(pair):
    near, far = pair
    stream = HostStream(near, INCARNATION, ChannelLimits())
    far.sendall(bytes(HEADER_BYTES))
    with pytest.raises(FrameError):
        stream.next_answer(is_owed=True)
    with pytest.raises(ChannelClosed):
        stream.send([b"x"])
    assert far.recv(10) == b""
