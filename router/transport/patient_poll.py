"""Waiting for answers: asleep, or awake where the wait is short and there is a core for it.

To be woken costs more than a short wait: on a virtual machine tens of microseconds for the sleeper, and some for who wakes it.
"""

import math
import os
import select
import time
from collections.abc import Callable

# The longest that one wait is stayed awake for; a wait that is usually longer is slept through.
LOOK_S = 50e-6
_LONGEST_COUNTED_S = 4 * LOOK_S  # one long pause must not hide for long that waits are short
_SHARE_OF_LAST = 0.25


class PatientPoll:
    """The descriptors that are readable, of those that are registered. One thread uses it.

    It stays awake only where the last waits for as many peers were short, and no more peers work than there are cores. Between
    two looks it lets whoever else can run go first: a peer that waits for this very core has it at once.
    """

    def __init__(self, num_cores: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._poll = select.poll()
        self.num_cores = num_cores or len(os.sched_getaffinity(0))
        self._clock = clock
        self._usual_waits_s: dict[int, float] = {}  # by the number of peers at work: the last one of many answers soon

    def register(self, fd: int) -> None:
        """Waits for it too from now on."""
        self._poll.register(fd, select.POLLIN)

    def unregister(self, fd: int) -> None:
        """And no longer."""
        self._poll.unregister(fd)

    def look_s(self, num_working: int) -> float:
        """How long to stay awake for the next answer; `num_working` peers are at work, on these cores for all that is known here."""
        return LOOK_S if num_working <= self.num_cores and self._usual_s(num_working) <= LOOK_S else 0.0

    def note(self, num_working: int, waited_s: float) -> None:
        """So long it took."""
        usual_s = self._usual_s(num_working)
        self._usual_waits_s[num_working] = usual_s + (min(waited_s, _LONGEST_COUNTED_S) - usual_s) * _SHARE_OF_LAST

    def wait(self, timeout_s: float, num_working: int) -> list[int]:
        """Waits for the first."""
        if num_working > self.num_cores or timeout_s <= 0:
            return self._sleep(timeout_s)
        look_s, started = self.look_s(num_working), self._clock()
        ready = self._look(started + min(look_s, timeout_s)) if look_s else []
        ready = ready or self._sleep(timeout_s)
        self.note(num_working, self._clock() - started)
        return ready

    def _usual_s(self, num_working: int) -> float:
        return self._usual_waits_s.get(num_working, _LONGEST_COUNTED_S)

    def _look(self, until: float) -> list[int]:
        while True:
            ready = [fd for fd, _ in self._poll.poll(0)]
            if ready or self._clock() >= until:
                return ready
            os.sched_yield()

    def _sleep(self, timeout_s: float) -> list[int]:
        return [fd for fd, _ in self._poll.poll(math.ceil(max(timeout_s, 0.0) * 1000))]
