"""How long the machine itself stood still: what a process that only sleeps does not sleep through."""

import subprocess
import sys
from types import TracebackType

_PROGRAM = """
import select, sys, time
longest_s, last_s = 0.0, time.monotonic()
while not select.select([sys.stdin], [], [], 0.005)[0]:
    now_s = time.monotonic()
    longest_s, last_s = max(longest_s, now_s - last_s - 0.005), now_s
print(longest_s)
"""


class StallWatch:
    """Context manager; afterwards `longest_s` is by how many seconds the latest of its 5 ms sleeps was late.

    A busy machine is late by milliseconds; whole tenths of a second are a hypervisor's or the kernel's, and no server can answer in them.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0

    def __enter__(self) -> "StallWatch":
        self._process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        told, _ = self._process.communicate("\n", timeout=30)
        self.longest_s = float(told)
