"""A metered expert host in a process of its own: it sleeps for each token's expert instead of computing it, and answers zeros.

Prints its endpoint as JSON; each line of its input is the delay of a choice from then on, in seconds, to which it answers, once it
holds, with the processor seconds that it has used so far; ends with its input. It holds no weights: hosts with devices of their own
would not compute on the router's cores either.
"""

import json
import sys
import time
from dataclasses import asdict

import torch
from torch import Tensor

from model.experts import ExpertSlots, HostBatch
from router.expert_server import ExpertServer
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

    def compute_small(self, layer: int, batch: HostBatch, max_bytes: int) -> bool:
        """Never: the delay would hold up heartbeats."""
        return False


def main() -> None:
    torch.set_num_threads(1)
    slots = MeteredSlots(num_threads=1)
    server = ExpertServer(slots)
    listener = Listener(SECRET, APPLICATION, NODE, on_frame=server.on_frame, answer_now=server.answer_now)
    print(json.dumps(asdict(listener.endpoint)), flush=True)
    for line in sys.stdin:
        slots.delay_s = float(line)
        print(time.process_time(), flush=True)
    listener.close()
    server.close()


if __name__ == "__main__":
    main()
