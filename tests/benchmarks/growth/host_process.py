"""A metered expert host in a process of its own: it sleeps for each token's expert instead of computing it, and answers zeros.

Prints its endpoint as JSON; each line of its input has two delays from then on, in seconds, of a choice and of the way here, to which it
answers, once they hold, with the processor seconds that it has used so far; ends with its input. It holds no weights: hosts with devices
of their own would not compute on the router's cores either.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from model.experts import ExpertSlots
from router.expert_server import ExpertServer
from router.transport.channel import Incoming
from router.transport.listener import Listener

SECRET, APPLICATION, NODE = b"a secret of at least sixteen bytes", "growth", "here"


class MeteredSlots(ExpertSlots):
    """`forward` takes `delay_s` for each choice, of whatever expert."""

    delay_s = 0.0

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Zeros [T, H]."""
        if self.delay_s:
            time.sleep(self.delay_s * int((expert_ids >= 0).sum()))
        return torch.zeros(hidden.shape, dtype=torch.float32)


class LongWay:
    """Frames arrive `delay_s` later, in order, and any number may be on their way: as over a slow network, not at a slow host."""

    def __init__(self, on_frame: Callable[[Incoming], None]) -> None:
        self.delay_s = 0.0
        self._on_frame = on_frame
        self._under_way: queue.SimpleQueue[tuple[float, Incoming]] = queue.SimpleQueue()
        threading.Thread(target=self._carry, daemon=True).start()

    def send(self, incoming: Incoming) -> None:
        """Returns at once."""
        if self.delay_s:
            self._under_way.put((time.perf_counter() + self.delay_s, incoming))
        else:
            self._on_frame(incoming)

    def _carry(self) -> None:
        while True:
            due, incoming = self._under_way.get()
            time.sleep(max(0.0, due - time.perf_counter()))
            self._on_frame(incoming)


def main() -> None:
    torch.set_num_threads(1)
    slots = MeteredSlots(num_threads=1)
    server = ExpertServer(slots)
    way = LongWay(server.on_frame)
    listener = Listener(SECRET, APPLICATION, NODE, on_frame=way.send, in_place=server.in_place)
    print(json.dumps(asdict(listener.endpoint)), flush=True)
    for line in sys.stdin:
        slots.delay_s, way.delay_s = map(float, line.split())
        print(time.process_time(), flush=True)
    listener.close()
    server.close()


if __name__ == "__main__":
    main()
