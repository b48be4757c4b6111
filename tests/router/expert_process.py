"""An expert host in a process of its own: prints its endpoint as JSON, serves all experts of `make_experts` until its input ends."""

import json
import sys
from dataclasses import asdict

import torch

from model.experts import ExpertSlots
from router.expert_server import ExpertServer
from router.transport.listener import Listener
from tests.router.expert_cluster import make_experts

SECRET, APPLICATION, NODE = b"a secret of at least sixteen bytes", "app", "node-1"


def serve(slots: ExpertSlots) -> None:
    """Says where it listens, and answers until standard input ends."""
    server = ExpertServer(slots)
    listener = Listener(SECRET, APPLICATION, NODE, on_frame=server.on_frame, in_place=server.in_place)
    print(json.dumps(asdict(listener.endpoint)), flush=True)
    sys.stdin.read()
    listener.close()
    server.close()


def main(num_experts: int) -> None:
    torch.set_num_threads(1)
    serve(ExpertSlots(make_experts(num_experts).items()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
