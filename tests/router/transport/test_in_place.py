"""A listener that answers decode frames by machine code, and what it leaves to Python."""

import contextlib
import queue
import struct
import threading
import time

import pytest
import torch

from router.errors import ChannelClosed
from router.transport.channel import ChannelLimits
from router.transport.connect import connect
from router.transport.frames import HEADER_BYTES, SHARED, ExpertsAnswer, FrameKind, Header, pack_header
from router.transport.heartbeat import HeartbeatLimits
from router.transport.listener import Listener, ListenerLimits
from tests.copies_in_place import CopiesInPlace
from tests.router.transport.processes import receive
from tests.router.transport.samples import echo_partial, make_request

LAYER, HIDDEN_SIZE = 7, 5  # of `make_request`


class Host:
    """A listener with the layers that it answers in place, threefold; what it hands on is echoed, or kept."""

    def __init__(self, max_choices=1 << 20, **options):
        self.handed_on = queue.Queue()
        self.keeps = False
        self.copies = CopiesInPlace(LAYER, HIDDEN_SIZE, 3, max_choices)
        self.listener = Listener(b"secret", "app", "node-1", self._on_frame, in_place=self.copies.table, **options)

    def _on_frame(self, incoming):
        self.handed_on.put(incoming)
        if not self.keeps:
            echo(incoming)

    def connect(self, node_id="node-1", limits=None):
        return contextlib.closing(connect(self.listener.endpoint, node_id, b"secret", "app", limits))


def echo(incoming):
    incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, FrameKind.PARTIAL, echo_partial(incoming.request)))


@pytest.fixture
def start():
    hosts = []

    def start(**options):
        hosts.append(Host(**options))
        return hosts[-1]

    yield start
    for host in hosts:
        host.listener.close()
        assert not host.listener.is_alive


def ask(channel, request, sequence=1, attempt=4):
    channel.send(sequence, attempt, request)
    answer = receive(channel)
    assert (answer.sequence, answer.attempt, answer.kind) == (sequence, attempt, FrameKind.PARTIAL)
    partial = answer.partial.clone()
    channel.release(sequence)
    return partial


def is_in_place(request, partial):
    """Whether machine code gave this answer; it is one of the two."""
    if torch.equal(partial, 3 * request.hidden.float()):
        return True
    assert torch.equal(partial, echo_partial(request))
    return False


@pytest.mark.parametrize(
    ("node_id", "options", "expected"),
    [
        ("node-1", {}, True),
        ("node-1", {"is_prefill": True}, False),
        ("node-1", {"layer": LAYER + 1}, False),
        ("node-1", {"layer": 2**32 - 1}, False),
        ("node-1", {"hidden_size": 6}, False),
        ("node-1", {"dtype": torch.bfloat16}, False),
        ("node-1", {"num_tokens": 30}, False),
        ("node-2", {}, False),
    ],
)
def test_a_lone_decode_frame_in_shared_memory_is_answered_in_place(start, node_id, options, expected):
    host = start(max_choices=58)
    with host.connect(node_id) as channel:
        for sequence in range(1, 4):
            request = make_request(seed=sequence, **options)
            assert is_in_place(request, ask(channel, request, sequence)) == expected
    assert host.handed_on.qsize() == (0 if expected else 3)
    assert host.copies.table.num_frames == (3 if expected else 0)


def test_kinds_of_frames_in_turns_on_one_channel(start):
    host = start()
    with host.connect() as channel:
        for sequence in range(1, 40):
            request = make_request(seed=sequence, is_prefill=sequence % 3 == 0, num_tokens=1 + sequence % 5)
            assert is_in_place(request, ask(channel, request, sequence)) == (sequence % 3 != 0)


def test_many_frames_at_once_of_many_routers_are_all_answered(start):
    host = start()
    wrong = []

    def run(seed):
        with host.connect() as channel:
            for first in range(1, 200, 8):
                requests = {
                    sequence: make_request(seed=seed + sequence, num_tokens=1 + sequence % 3) for sequence in range(first, first + 8)
                }
                for sequence, request in requests.items():
                    channel.send(sequence, 1, request)
                for _ in range(8):
                    answer = receive(channel)
                    try:
                        is_in_place(requests.pop(answer.sequence), answer.partial)
                    except Exception as error:
                        wrong.append(error)
                    channel.release(answer.sequence)

    threads = [threading.Thread(target=run, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_while_a_frame_waits_for_the_compute_thread_the_order_is_pythons(start):
    host = start()
    host.keeps = True
    with host.connect() as channel:
        channel.send(1, 1, make_request(is_prefill=True))
        waiting = host.handed_on.get(timeout=30)
        channel.send(2, 1, make_request())
        second = host.handed_on.get(timeout=30)
        assert host.copies.table.num_frames == 0
        echo(second)
        echo(waiting)
        assert {receive(channel).sequence for _ in range(2)} == {1, 2}
        host.keeps = False
        request = make_request(seed=3)
        assert is_in_place(request, ask(channel, request, 3))


def test_heartbeats_are_answered_and_tell_of_frames_answered_in_place(start):
    host = start()
    host.keeps = True
    limits = ChannelLimits(heartbeat=HeartbeatLimits(interval_s=0.01))
    with host.connect(limits=limits) as channel:
        for sequence in range(1, 4):
            ask(channel, make_request(), sequence)
        channel.send(9, 1, make_request(is_prefill=True))
        deadline = time.monotonic() + 30
        while channel.heartbeat.num_answered < 3:
            assert channel.receive() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)


def raw_stream(channel):
    """The socket of a channel whose own end is not used meanwhile."""
    return channel.stream._sock


def headers_of(channel, *requests):
    """What `send` writes for these, without its being sent."""
    written, stream = [], channel.stream
    send, stream.send = stream.send, lambda buffers: written.append(bytes(buffers[0]))
    for sequence, request in requests:
        channel.send(sequence, 1, request)
    stream.send = send
    return written


def test_a_header_that_comes_in_pieces_is_put_together(start):
    host = start()
    with host.connect() as channel:
        request = make_request()
        (header,) = headers_of(channel, (1, request))
        sock = raw_stream(channel)
        sock.send(header[:30])
        time.sleep(0.05)
        sock.send(header[30:])
        assert is_in_place(request, receive(channel).partial) is False  # Python's, since it had begun to read it
        channel.release(1)
        request = make_request(seed=2)
        assert is_in_place(request, ask(channel, request, 2))


def test_frames_that_come_in_one_write_are_all_answered(start):
    host = start()
    with host.connect() as channel:
        requests = {sequence: make_request(seed=sequence) for sequence in range(1, 6)}
        headers = headers_of(channel, *requests.items())
        ping = pack_header(Header(FrameKind.PING, channel.stream.incarnation))
        raw_stream(channel).send(ping + b"".join(headers[:3]) + ping + b"".join(headers[3:]) + headers[0][:7])
        for _ in requests:
            answer = receive(channel)
            is_in_place(requests[answer.sequence], answer.partial)
        raw_stream(channel).send(headers[0][7:])  # asked again: its place holds the request still
        assert host.listener.is_alive


@pytest.mark.parametrize("place", [0, 5, 6, 46, 60, 80])
def test_a_broken_header_costs_its_channel_and_nothing_else(start, place, caplog):
    host = start()
    with host.connect() as channel, host.connect() as other:
        (header,) = headers_of(channel, (1, make_request()))
        raw_stream(channel).send(header[:place] + bytes([header[place] ^ 0x40]) + header[place + 1 :])
        with pytest.raises(ChannelClosed):
            receive(channel)
        request = make_request()
        assert is_in_place(request, ask(other, request))
    assert "a channel is cut off" in caplog.text


def test_a_request_that_lies_outside_of_the_buffer_is_cut_off(start):
    host = start()
    with host.connect(limits=ChannelLimits(shared_bytes=1 << 16)) as channel:
        request = make_request()
        length = struct.calcsize("f") * request.hidden.numel() + 6 * request.expert_ids.numel()
        sizes = (*request.hidden.shape, request.expert_ids.shape[1], 1)
        outside = Header(FrameKind.EXPERTS, channel.stream.incarnation, 1, 1, 0, 0, LAYER, *sizes, SHARED, 1 << 16, length)
        raw_stream(channel).send(pack_header(outside))
        with pytest.raises(ChannelClosed):
            receive(channel)


def test_an_answer_that_the_socket_does_not_take_is_sent_when_it_does(start):
    """The router does not read: its socket fills up, answers are queued by Python, and none is lost or out of its frame."""
    host = start(limits=ListenerLimits(max_waiting_frames=1 << 20))
    with host.connect(limits=ChannelLimits(max_frames=1 << 20)) as channel:
        request = make_request(num_tokens=1)
        number = 6000
        for sequence in range(1, number + 1):
            channel.send(sequence, 1, request)
        seen = set()
        while len(seen) < number:
            answer = receive(channel)
            assert answer.kind == FrameKind.PARTIAL
            is_in_place(request, answer.partial)
            channel.release(answer.sequence)
            seen.add(answer.sequence)
        assert host.copies.table.num_frames > 0
        ask(channel, request, number + 1)
    assert HEADER_BYTES * number > 1 << 18


def test_routers_come_and_go(start):
    host = start()
    for number in range(80):
        with host.connect() as channel:
            request = make_request(seed=number)
            assert is_in_place(request, ask(channel, request))
