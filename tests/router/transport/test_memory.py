import select
import threading

import pytest
import torch

from router.errors import ChannelClosed, ChannelFull
from router.transport.frames import ExpertsAnswer, FrameKind
from router.transport.heartbeat import HeartbeatLimits
from router.transport.memory import Faults, MemoryHost
from tests.router.transport.samples import assert_equal_requests, echo_partial, make_request


def echo(incoming):
    incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, FrameKind.PARTIAL, echo_partial(incoming.request)))


def is_readable(channel, timeout_s=0.0):
    return bool(select.select([channel], [], [], timeout_s)[0])


def test_echo_comes_back_and_the_descriptor_says_so():
    channel = MemoryHost(echo).connect()
    request = make_request(dtype=torch.bfloat16)
    assert not is_readable(channel)
    assert channel.receive() is None
    channel.send(1, 1, request)
    assert is_readable(channel)
    answer = channel.receive()
    assert torch.equal(answer.partial, echo_partial(request))
    assert channel.receive() is None
    assert not is_readable(channel)
    channel.close()
    channel.close()


def test_host_sees_its_own_copy_of_the_request():
    kept = []
    channel = MemoryHost(kept.append).connect()
    request = make_request()
    channel.send(1, 1, request)
    expected = make_request()
    request.hidden.zero_()
    assert_equal_requests(kept[0].request, expected)


def test_partial_dies_with_its_release():
    channel = MemoryHost(echo).connect()
    channel.send(1, 1, make_request())
    partial = channel.receive().partial
    assert not partial.isnan().any()
    channel.release(1)
    assert partial.isnan().all()


def test_answers_from_another_thread_in_any_order():
    kept = []
    channel = MemoryHost(kept.append).connect()
    for sequence in (1, 2, 3):
        channel.send(sequence, 1, make_request(seed=sequence))
    thread = threading.Thread(target=lambda: [echo(incoming) for incoming in reversed(kept)])
    thread.start()
    thread.join()
    assert [channel.receive().sequence for _ in range(3)] == [3, 2, 1]


def test_lost_frames_and_answers_and_repeated_ones():
    kept = []
    faults = Faults(lose_request=lambda sequence, attempt: sequence == 1, lose_answer=lambda sequence, attempt: sequence == 2)
    channel = MemoryHost(lambda incoming: (kept.append(incoming.sequence), echo(incoming))).connect(faults)
    faults.num_answer_copies = 3
    for sequence in (1, 2, 3):
        channel.send(sequence, 1, make_request())
    assert kept == [2, 3]
    assert channel.receive().sequence == 3
    assert channel.receive() is None


def test_host_answers_once():
    kept = []
    channel = MemoryHost(kept.append).connect()
    channel.send(1, 1, make_request())
    echo(kept[0])
    echo(kept[0])
    assert channel.receive() is not None
    assert channel.receive() is None


def test_answer_that_names_another_frame_is_the_host_s_bug():
    kept = []
    channel = MemoryHost(kept.append).connect()
    channel.send(1, 2, make_request())
    with pytest.raises(AssertionError):
        kept[0].answer(ExpertsAnswer(1, 1, FrameKind.BUSY))
    assert channel.receive() is None


def test_channel_that_time_outs_have_used_up_asks_for_a_new_one():
    channel = MemoryHost(lambda incoming: None).connect(max_frames=1)
    channel.send(1, 1, make_request())
    channel.release(1, abandoned=True)
    with pytest.raises(ChannelClosed):
        channel.send(2, 1, make_request())


def test_late_answer_of_an_abandoned_frame_is_dropped_and_its_buffer_stays_aside():
    kept = []
    channel = MemoryHost(kept.append).connect(max_frames=2)
    channel.send(1, 1, make_request())
    assert not kept[0].cancelled()
    channel.release(1, abandoned=True)
    assert kept[0].cancelled()
    echo(kept[0])
    assert channel.receive() is None
    channel.send(2, 1, make_request())
    with pytest.raises(ChannelFull):
        channel.send(3, 1, make_request())


def test_delayed_answer_wakes_the_descriptor():
    channel = MemoryHost(echo).connect(Faults(answer_delay_s=0.01))
    channel.send(1, 1, make_request())
    assert is_readable(channel, 10.0)
    assert channel.receive().sequence == 1


def test_disconnect_delivers_what_has_arrived_then_closes():
    host = MemoryHost(echo)
    channel = host.connect()
    channel.send(1, 1, make_request())
    host.disconnect()
    assert is_readable(channel)
    assert channel.receive().sequence == 1
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(2, 1, make_request())
    channel.release(1)
    assert is_readable(channel)


def test_answer_after_disconnect_is_a_no_op_and_the_frame_is_cancelled():
    kept = []
    host = MemoryHost(kept.append)
    channel = host.connect()
    channel.send(1, 1, make_request())
    host.disconnect()
    assert kept[0].cancelled()
    echo(kept[0])
    with pytest.raises(ChannelClosed):
        channel.receive()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_slow_host_answers_heartbeats_and_stays():
    clock, kept = Clock(), []
    host = MemoryHost(kept.append)
    channel = host.connect(limits=HeartbeatLimits(0.5, 5.0), clock=clock)
    channel.send(1, 1, make_request())
    host.num_answered = 42
    for _ in range(100):
        clock.now += 1.0
        assert channel.receive() is None
        assert channel.receive() is None
    assert channel.heartbeat.num_answered == 42
    assert clock.now - channel.heartbeat.last_heard <= 1.0


def test_silent_host_is_dead_after_the_limit():
    clock = Clock()
    channel = MemoryHost(lambda incoming: None).connect(Faults(is_silent=True), limits=HeartbeatLimits(0.5, 5.0), clock=clock)
    clock.now += 1000.0
    channel.send(1, 1, make_request())
    assert channel.receive() is None
    clock.now += 1.0
    assert channel.receive() is None
    clock.now += 4.9
    assert channel.receive() is None
    clock.now += 0.2
    with pytest.raises(ChannelClosed, match="heartbeat"):
        channel.receive()


def test_idle_channel_is_not_asked():
    clock = Clock()
    channel = MemoryHost(echo).connect(Faults(is_silent=True), clock=clock)
    clock.now += 1000.0
    assert channel.receive() is None
    clock.now += 1000.0
    assert channel.receive() is None
