"""Gateway and router: messages over a real listener, both kinds of socket."""

import asyncio
import queue
import socket
import zlib
from contextlib import suppress

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ChannelClosed, FrameError, HandshakeError
from router.placement_map import Endpoint
from router.transport.frames import MAX_MESSAGE_BYTES, FrameKind, Header, decode_frame, pack_header
from router.transport.handshake import Role
from router.transport.listener import Listener, ListenerLimits
from router.transport.messages import MessageClient, decode_message, encode_message
from tests.router.transport.test_listener import is_cut_off, proved_socket

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(-(2**63), 2**63), inner),
    max_leaves=6,
)
messages = st.dictionaries(st.text(max_size=8), plain, max_size=4)


@given(messages)
def test_message_round_trip(message):
    header, payload = decode_frame(b"".join(encode_message(7, message)))
    assert (header.kind, header.incarnation) == (FrameKind.MESSAGE, 7)
    assert decode_message(payload) == message


@given(messages, st.data())
def test_damaged_message_is_an_error(message, data):
    frame = bytearray(b"".join(encode_message(7, message)))
    with pytest.raises(FrameError):
        decode_frame(frame[: data.draw(st.integers(0, len(frame) - 1))])
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        decode_frame(frame)


@given(st.binary(max_size=200))
def test_any_payload_is_a_map_or_an_error(payload):
    with suppress(FrameError):
        assert isinstance(decode_message(payload), dict)


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgpack.packb([1]), b"\x81\x90\x01", b"\x91" * 100_000, b"\xdf\xff\xff\xff\xff"])
def test_payload_that_is_no_map_is_an_error(payload):
    with pytest.raises(FrameError):
        decode_message(payload)


def test_message_that_cannot_travel_is_refused():
    with pytest.raises(FrameError, match="limit"):
        encode_message(1, {"blob": bytes(MAX_MESSAGE_BYTES)})
    with pytest.raises(FrameError, match="packed"):
        encode_message(1, {"what": object()})


class Router:
    """Collects what gateways send; echoes it where asked to."""

    def __init__(self, *, echoes=True, **options):
        self.connections = []
        self.arrived = queue.SimpleQueue()
        self.closed = queue.SimpleQueue()
        self.echoes = echoes
        self.listener = Listener(b"secret", "app", "node-1", on_message=self.take, on_message_close=self.closed.put, **options)

    def take(self, connection, message):
        self.arrived.put((connection, message))
        if self.echoes:
            connection.send(message)

    async def client(self, node_id="node-1", **changed):
        secret, application = changed.get("secret", b"secret"), changed.get("application", "app")
        return await MessageClient.connect(self.listener.endpoint, node_id, secret, application)


@pytest.fixture
def router():
    router = Router()
    yield router
    router.listener.close()


@pytest.fixture(params=["node-1", "node-2"], ids=["unix", "tcp"])
def node_id(request):
    return request.param


async def take(arrived):
    return await asyncio.to_thread(arrived.get, timeout=30)


async def test_messages_come_back_in_order(router, node_id):
    client = await router.client(node_id)
    sent = [{"n": n, "text": "é" * n, "bias": {n: 1.5}, "blob": bytes(n)} for n in (0, 1, 1000, 200_000)]
    for message in sent:
        await client.send(message)
    received = []
    async for message in client:
        received.append(message)
        if len(received) == len(sent):
            break
    assert received == sent
    await client.close()
    await client.close()
    connection = (await take(router.arrived))[0]
    assert await take(router.closed) is connection
    connection.send({"to": "nobody"})
    with pytest.raises(ChannelClosed):
        await client.send({})


async def test_big_messages_both_ways_at_once(router, node_id):
    client = await router.client(node_id)
    blob = bytes(range(256)) * (1 << 14)

    async def send():
        for n in range(8):
            await client.send({"n": n, "blob": blob})

    sending = asyncio.create_task(send())
    for n in range(8):
        assert await anext(client) == {"n": n, "blob": blob}
    await sending
    await client.close()


async def test_two_gateways_are_told_apart(router):
    clients = [await router.client(), await router.client("node-2")]
    for n, client in enumerate(clients):
        await client.send({"n": n})
    for n, client in enumerate(clients):
        assert await anext(client) == {"n": n}
        await client.close()


async def test_iteration_ends_when_the_router_goes(router, node_id):
    client = await router.client(node_id)
    await client.send({"n": 1})
    assert await anext(client) == {"n": 1}
    router.listener.close()
    assert [message async for message in client] == []
    await client.close()


async def test_reader_that_is_cancelled_loses_nothing(router):
    client = await router.client()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(client), 0.01)
    await client.send({"n": 1})
    assert await anext(client) == {"n": 1}
    await client.close()


async def test_gateway_that_does_not_read_is_cut_off_and_delays_nobody():
    router = Router(echoes=False, limits=ListenerLimits(max_queued_message_bytes=1 << 20))
    slow, quick = await router.client(), await router.client("node-2")
    await slow.send({"who": "slow"})
    connection = (await take(router.arrived))[0]
    for _ in range(40):
        connection.send({"blob": bytes(1 << 19)})
    assert await take(router.closed) is connection
    await quick.send({"who": "quick"})
    other = (await take(router.arrived))[0]
    other.send({"n": 1})
    assert await anext(quick) == {"n": 1}
    await slow.close()
    await quick.close()
    router.listener.close()


async def test_hang_up_ends_the_gateway_s_iteration(router):
    client = await router.client()
    await client.send({"n": 1})
    assert await anext(client) == {"n": 1}
    (await take(router.arrived))[0].hang_up()
    assert [message async for message in client] == []
    await client.close()


async def test_wrong_secret_or_application_is_refused(router, node_id):
    for changed in ({"secret": b"guess"}, {"application": "other"}):
        with pytest.raises(HandshakeError):
            await router.client(node_id, **changed)


async def test_nobody_there(router, node_id):
    router.listener.close()
    with pytest.raises(ChannelClosed, match="cannot reach"):
        await router.client(node_id)


async def test_router_that_never_answers_the_handshake_meets_the_deadline():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        endpoint = Endpoint("elsewhere", "", *mute.getsockname())
        with pytest.raises(ChannelClosed, match="cannot reach"):
            await MessageClient.connect(endpoint, "here", b"secret", "app", timeout_s=0.1)


@pytest.mark.parametrize(
    "broken",
    [
        pack_header(Header(FrameKind.MESSAGE, 5, length=3, payload_crc=1)) + b"abc",
        pack_header(Header(FrameKind.MESSAGE, 5, length=1, payload_crc=zlib.crc32(b"\xc1"))) + b"\xc1",
        pack_header(Header(FrameKind.CANCEL, 5)),
        b"junk" * 100,
    ],
    ids=["checksum", "no map", "a router's frame", "junk"],
)
def test_gateway_that_breaks_the_protocol_is_cut_off(router, broken):
    sock = proved_socket(router.listener, role=Role.GATEWAY)
    sock.sendall(broken)
    assert is_cut_off(sock)
    assert router.closed.get(timeout=30) is not None
    assert router.arrived.empty()


async def test_broken_frame_from_the_router_ends_the_client():
    frame = b"".join(encode_message(7, {"n": 1}))
    server_sides = []

    async def serve(_, writer):
        server_sides.append(writer)
        writer.write(frame + frame[:-1] + b"\x99" + frame)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    client = MessageClient(reader, writer, 7)
    assert await anext(client) == {"n": 1}
    with pytest.raises(FrameError, match="checksum"):
        await anext(client)
    assert [message async for message in client] == []
    await client.close()
    server_sides[0].close()
    server.close()
    await server.wait_closed()
