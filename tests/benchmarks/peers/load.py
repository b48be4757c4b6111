"""The load generator: C clients in a closed loop, each stream's reads with their times; a process of its own, the same for every side.

    python -m tests.benchmarks.peers.load < ORDER.json > ANSWERS.json

Nothing is parsed while streams are open: a client reads, notes the time and reads on, which costs a server's cores next to nothing.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.peers.environments import ROOT, PeerFailed
from tests.benchmarks.peers.sse import Read, completion_tokens, events_of, token_times

PATH = "/v1/completions"
END = b"data: [DONE]"
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Order:
    """Request bodies for one server, asked by `clients` at once, each its next when its last one is answered."""

    host: str
    port: int
    bodies: tuple[dict[str, Any], ...]
    clients: int
    timeout_s: float


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent, when tokens came, when [DONE] did (seconds of one clock), and how many tokens in all."""

    sent_s: float
    token_s: tuple[float, ...]
    done_s: float
    num_tokens: int


def run_load(order: Order) -> list[Answered]:
    """In another process. Raises PeerFailed if a request fails or all are not answered in time."""
    command = [sys.executable, "-m", "tests.benchmarks.peers.load"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(order)), capture_output=True, text=True, timeout=order.timeout_s + 30.0, check=False, cwd=ROOT
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"{len(order.bodies)} requests were not answered within {order.timeout_s:.0f} s") from error
    if done.returncode:
        raise PeerFailed(f"the load failed: {done.stderr.strip().splitlines()[-1:]}")
    return [Answered(**{**each, "token_s": tuple(each["token_s"])}) for each in json.loads(done.stdout)]


async def _ask(order: Order, body: dict[str, Any]) -> tuple[float, list[Read]]:
    data = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {order.host}:{order.port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    sent_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(order.host, order.port)
    try:
        writer.write(head.encode() + data)
        reads: list[Read] = []
        last = b""
        while data := await reader.read(READ_BYTES):
            reads.append((time.perf_counter(), data))
            last = last[-len(END) :] + data
            if END in last:
                break
        return sent_s, reads
    finally:
        writer.close()


async def _closed_loop(order: Order) -> list[tuple[float, list[Read]]]:
    waiting = iter(order.bodies)

    async def client() -> list[tuple[float, list[Read]]]:
        return [await _ask(order, body) for body in waiting]

    clients = await asyncio.wait_for(asyncio.gather(*(client() for _ in range(order.clients))), order.timeout_s)
    return [answer for answers in clients for answer in answers]


def answered(sent_s: float, reads: Sequence[Read]) -> Answered:
    """What the reads of one stream tell. ValueError if the answer is not whole."""
    if not reads:
        raise ValueError("the server closed the connection without an answer")
    events = events_of(reads)
    return Answered(sent_s, tuple(token_times(events)), reads[-1][0], completion_tokens(events))


def main() -> None:
    given = json.load(sys.stdin)
    order = Order(**{**given, "bodies": tuple(given["bodies"])})
    answers = [answered(sent_s, reads) for sent_s, reads in asyncio.run(_closed_loop(order))]
    json.dump([asdict(each) for each in answers], sys.stdout)


if __name__ == "__main__":
    main()
