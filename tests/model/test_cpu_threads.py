"""The crew: every part of a job is done once, whoever is awake, asleep, late, or cannot be had at all."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from model import cpu_parts, cpu_threads
from model.cpu_crew import parked_of, rest_of
from model.cpu_parts import array_at, bits, real, take, word


def _add(block):
    """Adds a number to the elements that each part takes."""
    size, part = word(block, 2), word(block, 3)
    target = array_at(np.empty(0, np.float64), word(block, 1), (size,))
    first = take(block, part)
    while first < size:
        for n in range(first, min(first + part, size)):
            target[n] += real(block, 4)
        first = take(block, part)
    return 1


def _meet(block):
    """Waits until so many threads are here, for some seconds."""
    take(block, 1)
    looks = 0
    while take(block, 0) < word(block, 1):
        looks += 1
        if looks > 500_000_000:
            return 0
    return 1


def _fail(_block):
    return 0


def _divide(block):
    return 1 + 1 // (word(block, 1) - 1)


@pytest.fixture(scope="module")
def add():
    return cpu_parts.job(_add)


def run(job, target, num_threads, part=1, number=1.0):
    cpu_threads.run_shares(job, (target.ctypes.data, len(target), part, bits(number)), num_threads)


@pytest.fixture
def crew(monkeypatch):
    """A crew of this test's own."""
    monkeypatch.setattr(cpu_threads, "_crew", [])
    return cpu_threads._this_crew()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_part_is_done_once(add, num_threads):
    targets = [np.zeros(size) for size in (0, 1, 7, 100, 1000)]
    for _ in range(300):
        for target in targets:
            run(add, target, num_threads, part=3, number=0.5)
    for target in targets:
        assert target.tolist() == [150.0] * len(target)


def test_helpers_that_have_gone_to_sleep_are_woken(crew):
    meet = cpu_parts.job(_meet)
    for _ in range(5):
        cpu_threads.run_shares(meet, (3,), 3)  # fails where they do not meet
        deadline = time.monotonic() + 10
        while len(asleep(crew)) < 2:
            assert time.monotonic() < deadline, "helpers stay awake"
            time.sleep(0.001)


def asleep(crew):
    return [helper for helper in range(crew.num_helpers) if parked_of(crew.table)[helper]]


def test_helpers_are_told_when_cores_are_lent_and_woken_for_work_that_comes_all_the_same(crew):
    meet = cpu_parts.job(_meet)
    cpu_threads.run_shares(meet, (2,), 2)
    assert rest_of(crew.table)[0] == 0
    try:
        cpu_threads.lend(1, 2)
        assert rest_of(crew.table)[0] == 1
        cpu_threads.run_shares(meet, (2,), 2)
    finally:
        cpu_threads.lend(0, 2)


def test_threads_that_work_at_once_do_not_mix_their_jobs(add):
    def work(number):
        target = np.zeros(1000)
        for _ in range(200):
            run(add, target, 2, part=10, number=number)
        return target

    with ThreadPoolExecutor(3) as threads:
        for number, target in zip((1.0, 2.0, 3.0), threads.map(work, (1.0, 2.0, 3.0)), strict=True):
            assert target.tolist() == [200 * number] * 1000


@pytest.mark.parametrize(
    ("of", "error"),
    [((threading.Thread, "start"), RuntimeError("can't start new thread")), ((os, "eventfd"), OSError(24, "Too many open files"))],
)
def test_without_threads_to_be_had_one_does_it_all(add, crew, monkeypatch, caplog, of, error):
    def start(*_):
        raise error

    monkeypatch.setattr(*of, start)
    target = np.zeros(50)
    run(add, target, 3)
    run(add, target, 3)
    assert target.tolist() == [2.0] * 50
    assert crew.num_helpers == 0
    assert [record.message for record in caplog.records] == [f"1 threads share the work of this process: no more can be started ({error})"]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_job_that_fails_is_told_and_the_next_one_done(add, num_threads):
    failing = cpu_parts.job(_fail)
    with pytest.raises(RuntimeError, match="compiled code failed"):
        cpu_threads.run_shares(failing, (), num_threads)
    target = np.zeros(5)
    run(add, target, num_threads)
    assert target.tolist() == [1.0] * 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_compiled_code_raises_is_a_failure():
    with pytest.raises(RuntimeError, match="compiled code failed"):
        cpu_threads.run_shares(cpu_parts.job(_divide), (1,), 1)


def test_a_forked_process_has_a_crew_of_its_own():
    script = """
        import os
        from model import cpu_parts, cpu_threads
        from tests.model.test_cpu_threads import _meet
        meet = cpu_parts.job(_meet)
        cpu_threads.run_shares(meet, (2,), 2)
        child = os.fork()
        cpu_threads.run_shares(meet, (2,), 2)  # fails where two threads do not meet
        if child == 0:
            os._exit(42)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    """
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, check=True, timeout=120)


def test_as_many_threads_as_torch_uses_or_as_are_allowed(monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", [])
    monkeypatch.setattr(cpu_threads, "_crew", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    much = 100 * cpu_threads.MIN_SHARE
    assert cpu_threads.num_shares_of(much) == 2
    cpu_threads.allow(5)
    assert cpu_threads.num_shares_of(much) == 5
    assert cpu_threads.num_shares_of(3 * cpu_threads.MIN_SHARE) == 3
    assert cpu_threads.num_shares_of(1) == 1
    try:
        cpu_threads.lend(2, 16)
        assert cpu_threads.num_shares_of(much) == 5
        cpu_threads.lend(2, 4)
        assert cpu_threads.num_shares_of(much) == 2
        cpu_threads.lend(9, 4)
        assert cpu_threads.num_shares_of(much) == 1
    finally:
        cpu_threads.lend(0, 4)
    assert cpu_threads.num_shares_of(much) == 5


def test_who_is_awake_is_asked_for_less(crew, monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", [4])
    few, many = 4 * cpu_threads.MIN_SHARE_AWAKE, 4 * cpu_threads.MIN_SHARE
    assert cpu_threads.num_shares_of(few) == 1, "there is no helper yet"
    crew.num_helpers = 3
    assert cpu_threads.num_shares_of(few) == 4
    parked_of(crew.table)[:2] = 1  # as those have it that sleep
    assert cpu_threads.num_shares_of(few) == 2
    assert cpu_threads.num_shares_of(few // 4) == 1
    assert cpu_threads.num_shares_of(many) == 4
    cpu_threads.rest()
    assert cpu_threads.num_shares_of(few) == 1
