"""The two real channels, against a host in a process of its own."""

import os
import select
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from router.errors import ChannelClosed, ChannelFull, ChannelRefused, FrameError, HandshakeError
from router.transport.channel import ChannelLimits
from router.transport.connect import connect
from router.transport.frames import HIDDEN_DTYPES, FrameKind
from router.transport.heartbeat import HeartbeatLimits
from router.transport.shared_memory import SharedMemoryChannel
from router.transport.tcp import TcpChannel
from tests.router.transport import echo_host as host
from tests.router.transport.processes import echo_host, receive
from tests.router.transport.samples import echo_partial, make_request

SAME_NODE, OTHER_NODE = "node-1", "node-2"


@pytest.fixture(scope="module")
def endpoint():
    with echo_host() as (_, endpoint):
        yield endpoint


@pytest.fixture(params=[SAME_NODE, OTHER_NODE], ids=["shared_memory", "tcp"])
def node_id(request):
    return request.param


@pytest.fixture
def open_channel(endpoint, node_id):
    channels = []

    def open_channel(**limits):
        channels.append(connect(endpoint, node_id, b"secret", "app", ChannelLimits(**limits)))
        return channels[-1]

    yield open_channel
    for channel in channels:
        channel.close()


def test_channel_is_chosen_by_node(endpoint):
    for node_id, kind in ((SAME_NODE, SharedMemoryChannel), (OTHER_NODE, TcpChannel)):
        channel = connect(endpoint, node_id, b"secret", "app")
        assert isinstance(channel, kind)
        channel.close()
        channel.close()
        with pytest.raises(ChannelClosed):
            channel.receive()


@pytest.mark.parametrize("dtype", HIDDEN_DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (64, 512, 6)])
def test_round_trip(open_channel, dtype, shape):
    channel = open_channel()
    for sequence in range(5):
        request = make_request(*shape, dtype=dtype, seed=sequence, layer=host.ECHO)
        channel.send(sequence, 1, request)
        answer = receive(channel)
        assert (answer.sequence, answer.attempt, answer.kind) == (sequence, 1, FrameKind.PARTIAL)
        assert torch.equal(answer.partial, echo_partial(request))
        channel.release(sequence)


def test_many_frames_in_flight_are_told_apart(open_channel):
    channel = open_channel()
    requests = {sequence: make_request(1 + sequence % 7, 33, seed=sequence, layer=host.ECHO) for sequence in range(200)}
    for sequence, request in requests.items():
        channel.send(sequence, sequence % 3, request)
    answers = [receive(channel) for _ in requests]
    assert {answer.sequence for answer in answers} == set(requests)
    for answer in answers:
        assert torch.equal(answer.partial, echo_partial(requests[answer.sequence]))


def test_descriptor_stays_readable_while_answers_wait(open_channel):
    channel = open_channel()
    for sequence in range(100):
        channel.send(sequence, 1, make_request(layer=host.REFUSE))
    for _ in range(100):
        assert select.select([channel], [], [], 30.0)[0]
        while channel.receive() is None:
            assert select.select([channel], [], [], 30.0)[0]
    assert channel.receive() is None
    assert not select.select([channel], [], [], 0.0)[0]


def test_answers_without_a_partial_sum(open_channel):
    channel = open_channel()
    channel.send(1, 1, make_request(layer=host.REFUSE))
    channel.send(2, 1, make_request(layer=host.FAIL))
    refused, failed = receive(channel), receive(channel)
    assert (refused.kind, refused.partial, refused.reason) == (FrameKind.NOT_HERE, None, "expert (1, 7) is not here")
    assert (failed.kind, failed.reason) == (FrameKind.FAILED, "")


def test_big_frames_both_ways_at_once(open_channel):
    """Each direction holds more than the kernel does: whoever only wrote, or only read, would wait for ever."""
    channel = open_channel(max_queued_bytes=1 << 20, send_timeout_s=60.0)
    request = make_request(1024, 2048, layer=host.ECHO)
    expected = echo_partial(request)
    for sequence in range(12):
        channel.send(sequence, 1, request)
    for _ in range(12):
        answer = receive(channel, 60.0)
        assert torch.equal(answer.partial, expected)
        channel.release(answer.sequence)


def test_abandoned_frame_is_cancelled_at_the_host_and_its_answer_never_seen(open_channel):
    channel = open_channel()
    channel.send(1, 1, make_request(layer=host.HOLD))
    channel.send(2, 1, make_request(layer=host.HOLD))
    channel.release(1, abandoned=True)
    channel.send(3, 1, make_request(layer=host.ANSWER_HELD))
    answers = {answer.sequence: answer for answer in (receive(channel), receive(channel))}
    assert set(answers) == {2, 3}
    assert answers[2].reason == "late"


def test_too_many_frames_in_flight(open_channel):
    channel = open_channel(max_frames=3)
    for sequence in range(3):
        channel.send(sequence, 1, make_request(layer=host.ECHO))
    with pytest.raises(ChannelFull):
        channel.send(3, 1, make_request(layer=host.ECHO))
    channel.release(receive(channel).sequence)
    channel.send(3, 1, make_request(layer=host.ECHO))


def test_request_that_cannot_travel_leaves_the_channel_open(open_channel):
    channel = open_channel(shared_bytes=1 << 16, max_payload_bytes=1 << 16)
    with pytest.raises(FrameError, match=r"larger|limit"):
        channel.send(1, 1, make_request(64, 512, layer=host.ECHO))
    with pytest.raises(FrameError, match="int16"):
        channel.send(1, 1, make_request()._replace(expert_ids=torch.zeros(3, 2, dtype=torch.int64)))
    channel.send(2, 1, make_request(layer=host.ECHO))
    assert receive(channel).sequence == 2


def test_slow_host_is_heard_while_it_computes(open_channel):
    channel = open_channel(heartbeat=HeartbeatLimits(interval_s=0.01, dead_after_s=30.0))
    channel.send(1, 1, make_request(layer=host.HOLD))
    first = channel.heartbeat.last_heard
    while channel.heartbeat.last_heard == first:
        assert channel.receive() is None
        select.select([channel], [], [], 0.01)


@pytest.mark.parametrize(("secret", "application"), [(b"other", "app"), (b"secret", "other"), (b"Secret", "app"), (b"secret", "")])
def test_wrong_secret_or_application_is_refused(endpoint, node_id, secret, application):
    with pytest.raises(HandshakeError, match="another secret or application"):
        connect(endpoint, node_id, secret, application)


def test_nobody_there(endpoint, node_id):
    gone = replace(endpoint, unix_name="shoal-nobody", tcp_port=1)
    with pytest.raises(ChannelRefused, match="cannot reach"):
        connect(gone, node_id, b"secret", "app")


def test_buffers_that_are_in_use_or_set_aside_are_not_handed_out(endpoint):
    channel = connect(endpoint, SAME_NODE, b"secret", "app", ChannelLimits(shared_bytes=1 << 16))
    request = make_request(8, 512, layer=host.HOLD)  # 16 KiB, and as much for its answer: a buffer of 64 KiB holds nothing else
    channel.send(1, 1, request)
    with pytest.raises(ChannelFull):
        channel.send(2, 1, request)
    channel.release(1, abandoned=True)
    with pytest.raises(ChannelClosed, match="time-outs have used the channel up"):
        channel.send(3, 1, request)


def test_release_of_an_unanswered_frame_does_not_reuse_its_buffer(endpoint):
    channel = connect(endpoint, SAME_NODE, b"secret", "app", ChannelLimits(shared_bytes=1 << 17))
    request = make_request(8, 512, layer=host.HOLD)
    channel.send(1, 1, request)
    channel.release(1)
    channel.send(2, 1, request)
    with pytest.raises(ChannelFull, match="65536 of them set aside"):
        channel.send(3, 1, request)
    channel.close()


def names_left_behind():
    unix = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@shoal-" in line}
    return unix | {name for name in os.listdir("/dev/shm") if "shoal" in name}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_host_is_seen_at_once_and_leaves_nothing(how):
    with echo_host() as (process, endpoint):
        channels = [connect(endpoint, node_id, b"secret", "app") for node_id in (SAME_NODE, OTHER_NODE)]
        for channel in channels:
            channel.send(1, 1, make_request(layer=host.HOLD))
        assert "@" + endpoint.unix_name in names_left_behind()
        process.send_signal(how)
        for channel in channels:
            with pytest.raises(ChannelClosed):
                receive(channel)
            with pytest.raises(ChannelClosed):
                channel.send(2, 1, make_request())
            channel.release(1)
            channel.close()
        process.wait(30)
        assert not any(endpoint.unix_name in name for name in names_left_behind())
        assert not [name for name in os.listdir("/dev/shm") if "shoal" in name]


def test_frozen_host_is_dead_when_heartbeats_stay_away():
    with echo_host() as (process, endpoint):
        limits = ChannelLimits(heartbeat=HeartbeatLimits(interval_s=0.05, dead_after_s=0.3))
        channels = [connect(endpoint, node_id, b"secret", "app", limits) for node_id in (SAME_NODE, OTHER_NODE)]
        process.send_signal(signal.SIGSTOP)
        try:
            for channel in channels:
                channel.send(1, 1, make_request(layer=host.HOLD))
                with pytest.raises(ChannelClosed, match="heartbeat"):
                    receive(channel)
        finally:
            process.send_signal(signal.SIGCONT)
