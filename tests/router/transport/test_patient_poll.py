"""When a wait is stayed awake for, with descriptors that are readable when the test says and a clock that it turns."""

import os

import pytest

from router.transport import patient_poll
from router.transport.patient_poll import LOOK_S, PatientPoll


class Peers:
    """Descriptors, a clock, and how often whoever waits has let others go first: what happens then, the test says."""

    def __init__(self, num_cores=2):
        self.now = 0.0
        self.num_yields = 0
        self.on_yield = lambda: None
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.poll = PatientPoll(num_cores, clock=self.read_clock)
        self._sleep, self.poll._sleep = self.poll._sleep, self.sleep
        for fd in self.fds:
            self.poll.register(fd)

    def sleep(self, timeout_s):
        ready = self._sleep(timeout_s)
        self.now += 0.0 if ready else timeout_s
        return ready

    def read_clock(self):
        self.now += LOOK_S / 10
        return self.now

    def yield_core(self):
        self.num_yields += 1
        self.on_yield()

    def answer(self, place=0):
        os.eventfd_write(self.fds[place], 1)

    def wait(self, num_working=1, timeout_s=0.001):
        ready = self.poll.wait(timeout_s, num_working)
        for fd in ready:
            os.eventfd_read(fd)
        return [self.fds.index(fd) for fd in ready]

    def become_short(self, num_working=1):
        """Answers that are there at once, until the waits count as short."""
        for _ in range(20):
            self.answer()
            assert self.wait(num_working) == [0]


@pytest.fixture
def peers(monkeypatch):
    peers = Peers()
    monkeypatch.setattr(patient_poll.os, "sched_yield", lambda: peers.yield_core())
    yield peers
    for fd in peers.fds:
        os.close(fd)


def test_all_that_are_readable_and_none_after_the_time(peers):
    peers.answer(0)
    peers.answer(1)
    assert peers.wait() == [0, 1]
    assert peers.wait() == []
    peers.poll.unregister(peers.fds[1])
    peers.answer(1)
    assert peers.poll.wait(0.0, 1) == []


def test_the_first_wait_is_slept_through_and_short_ones_are_not(peers):
    assert peers.wait() == []
    assert peers.num_yields == 0
    peers.become_short()
    peers.on_yield = peers.answer
    assert peers.wait() == [0]
    assert peers.num_yields == 1


def test_a_wait_that_gets_long_is_slept_through_from_then_on(peers):
    peers.become_short()
    assert peers.wait() == []
    assert 0 < peers.num_yields <= 10
    for _ in range(20):
        peers.num_yields = 0
        assert peers.wait() == []
    assert peers.num_yields == 0
    peers.become_short()
    assert peers.wait() == []
    assert peers.num_yields > 0


def test_waits_for_many_and_for_the_last_are_told_apart(peers):
    peers.become_short(num_working=1)
    assert peers.wait(num_working=2) == []
    assert peers.num_yields == 0


def test_nobody_stays_awake_while_more_work_than_there_are_cores(peers):
    peers.become_short(num_working=3)
    assert peers.wait(num_working=3) == []
    assert peers.num_yields == 0
