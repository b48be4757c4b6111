"""A host in a process of its own: prints its endpoint as JSON, answers until its standard input ends.

What it does with a frame is chosen by the frame's layer. Compute has a thread of its own, as in a real host.
"""

import json
import queue
import sys
import threading
from dataclasses import asdict

import torch

from router.transport.channel import Incoming
from router.transport.frames import ExpertsAnswer, FrameKind
from router.transport.listener import Listener
from tests.router.transport.samples import echo_partial

ECHO, REFUSE, HOLD, FAIL, ANSWER_HELD, COPY = 0, 1, 2, 3, 4, 5


def compute(arrived: "queue.SimpleQueue[Incoming]") -> None:
    held: list[Incoming] = []
    while True:
        incoming = arrived.get()
        layer = incoming.request.layer
        if layer == HOLD:
            held.append(incoming)
            continue
        if layer == ANSWER_HELD:
            for late in held:
                answer(late, FrameKind.FAILED, reason="cancelled" if late.cancelled() else "late")
        if layer == REFUSE:
            answer(incoming, FrameKind.NOT_HERE, reason="expert (1, 7) is not here")
        elif layer == COPY:
            answer(incoming, FrameKind.PARTIAL, incoming.request.hidden)
        elif layer == FAIL:
            answer(incoming, FrameKind.FAILED)
        else:
            answer(incoming, FrameKind.PARTIAL, echo_partial(incoming.request))


def answer(incoming, kind, partial=None, reason=""):
    incoming.answer(ExpertsAnswer(incoming.sequence, incoming.attempt, kind, partial, reason))


def main(secret: str, application: str, node_id: str) -> None:
    torch.set_num_threads(1)
    arrived: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
    threading.Thread(target=compute, args=(arrived,), daemon=True).start()
    listener = Listener(secret.encode(), application, node_id, on_frame=arrived.put)
    print(json.dumps(asdict(listener.endpoint)), flush=True)
    sys.stdin.read()
    listener.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
