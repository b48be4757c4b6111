"""A host of the hop benchmark, in a process of its own: answers a frame with the hidden states that it was sent.

What the product does and the bare floor of it, side by side: the channels' listener, which copies in its own thread as a real
host computes a decode step (layer IN_PLACE), or hands the frame to a compute thread (any other layer); and a thread that waits
for one number on an eventfd, copies as many rows, and says so on another eventfd.
"""

import contextlib
import json
import mmap
import os
import queue
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from router.placement_map import Endpoint
from router.transport.frames import ExpertsAnswer, FrameKind
from router.transport.listener import Listener
from tests.copies_in_place import CopiesInPlace

HIDDEN_SIZE, MAX_TOKENS = 512, 256
IN_PLACE, BY_THREAD = 1, 2
SECRET, APPLICATION, NODE = b"secret", "app", "here"
_END = MAX_TOKENS + 1  # in place of a number of rows


class BareHost:
    """The router's end of the floor: memory that the host maps too, and one eventfd each way."""

    def __init__(self):
        self.memory = os.memfd_create("hop")
        os.ftruncate(self.memory, 2 * MAX_TOKENS * HIDDEN_SIZE * 4)
        self.there, self.back = os.eventfd(0), os.eventfd(0)
        self.request, self.answer = _rows(self.memory)

    @property
    def fds(self):
        """For the host to inherit."""
        return self.memory, self.there, self.back

    def close(self):
        """Ends the host's thread."""
        os.eventfd_write(self.there, _END)


@contextlib.contextmanager
def hop_host():
    """Yields (process, endpoint, bare) of a host that ends with the block."""
    bare = BareHost()
    command = [sys.executable, "-m", "tests.benchmarks.hop_host", *map(str, bare.fds)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True, pass_fds=bare.fds)
    try:
        yield process, Endpoint(**json.loads(process.stdout.readline())), bare
    finally:
        bare.close()
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _rows(memory):
    rows = np.frombuffer(mmap.mmap(memory, 0), np.float32).reshape(2, MAX_TOKENS, HIDDEN_SIZE)
    return rows[0], rows[1]


def _copy_bare(memory, there, back):
    request, answer = _rows(memory)
    while (num_rows := os.eventfd_read(there)) < _END:
        answer[:num_rows] = request[:num_rows]
        os.eventfd_write(back, 1)


def _compute(arrived):
    while True:
        incoming = arrived.get()
        incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, FrameKind.PARTIAL, incoming.request.hidden))


def main(*bare_fds):
    """Until standard input ends."""
    torch.set_num_threads(1)
    arrived = queue.SimpleQueue()
    threading.Thread(target=_compute, args=(arrived,), daemon=True).start()
    threading.Thread(target=_copy_bare, args=bare_fds, daemon=True).start()
    copies = CopiesInPlace(IN_PLACE, HIDDEN_SIZE)
    listener = Listener(SECRET, APPLICATION, NODE, on_frame=arrived.put, in_place=copies.table)
    print(json.dumps(asdict(listener.endpoint)), flush=True)
    sys.stdin.read()
    listener.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
