"""Stream messages a second through Serve's ingress, one gateway against an application that does nothing.

    python -m tests.benchmarks.ingress [--write]

All are applications of one Serve, on one Ray of one machine, and take turns: gRPC and HTTP, 64 streams at once, each with the
same number of messages. The gateway is the deployed one; its router replays a token for every stream each 2.5 ms, 25,600 a second in
all. Of the others, `steps` yields one ready message for every stream each 2.5 ms, as tokens come, and `at once` all of them without waiting
for anything, so that Serve carries a whole stream in a few pieces: no stream of a model is like that, but it is all that Serve can do.
"""

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc
import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster.api.proto.shoal.v1 import inference_pb2
from cluster.doors import GRPC_SERVICES
from tests.benchmarks.replayed_gateway import NOTHING, Nothing, replayed
from tests.benchmarks.results import machine, write_section
from tests.free_ports import free_port
from tests.tiny_models import write_tiny

NUM_STREAMS, NUM_MESSAGES, NUM_TURNS, STEP_S = 64, 192, 3, 0.0025
NAME = "replayed"
IDLE = {"steps": STEP_S, "at-once": None}  # application: seconds between two messages of a stream
ADD_NOTHING = "tests.benchmarks.replayed_gateway.add_nothing"
Streams = Callable[[], Awaitable[int]]


async def grpc_streams(address: str, application: str, method: str, num_messages: int) -> int:
    """Messages that came, of all streams together."""
    sampling = inference_pb2.SamplingParams(max_tokens=num_messages, ignore_eos=True)
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]), sampling=sampling).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:

        async def stream() -> int:
            num = 0
            async for _ in channel.unary_stream(method)(request, metadata=(("application", application),)):
                num += 1
            return num

        return sum(await asyncio.gather(*(stream() for _ in range(NUM_STREAMS))))


async def http_streams(port: int, application: str, num_messages: int) -> int:
    """Events that came, of all streams together."""
    body = json.dumps({"model": NAME, "prompt": [5, 6, 7], "max_tokens": num_messages, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /{application}/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"

    async def stream() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
        received = await reader.read(-1)
        writer.close()
        return received.count(b"data: {")

    return sum(await asyncio.gather(*(stream() for _ in range(NUM_STREAMS))))


def messages_per_s(streams: Streams, at_least: int) -> float:
    """Of one turn."""
    begun = time.perf_counter()
    num = asyncio.run(streams())
    assert num >= at_least, f"{num} messages came of {at_least}"
    return num / (time.perf_counter() - begun)


def measure(num_messages: int, num_turns: int) -> dict[str, dict[str, list[float]]]:
    """Messages a second by protocol and side, one for each turn."""
    http_port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_tiny("v2-lite", Path(directory))
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            serve.start(
                http_options=HTTPOptions(port=http_port),
                grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=[*GRPC_SERVICES, ADD_NOTHING]),
                logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            )
            for name, step_s in IDLE.items():
                serve.run(Nothing.bind(step_s), name=name, route_prefix=f"/{name}")
            serve.run(replayed(checkpoint, NAME, STEP_S), name=NAME, route_prefix=f"/{NAME}")
            address = f"127.0.0.1:{grpc_port}"
            method = {NAME: "/shoal.v1.Inference/Generate", **dict.fromkeys(IDLE, f"/{NOTHING}/Stream")}
            ways: dict[str, dict[str, Callable[[int], Awaitable[int]]]] = {
                "gRPC": {side: partial(grpc_streams, address, side, method[side]) for side in method},
                "HTTP": {side: partial(http_streams, http_port, side) for side in method},
            }
            for sides in ways.values():
                for way in sides.values():
                    asyncio.run(way(4))
            rates: dict[str, dict[str, list[float]]] = {protocol: {side: [] for side in sides} for protocol, sides in ways.items()}
            for _ in range(num_turns):
                for protocol, sides in ways.items():
                    for side, way in sides.items():
                        rate = messages_per_s(lambda way=way: way(num_messages), NUM_STREAMS * num_messages * 9 // 10)
                        rates[protocol][side].append(rate)
            return rates
        finally:
            serve.shutdown()
            ray.shutdown()


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and what share of the idle applications' the gateway's is."""
    lines = [
        "| messages/s | one gateway | idle application, in steps | share | idle application, at once | share |",
        "| --- " * 6 + "|",
    ]
    for protocol, sides in rates.items():
        gateway, *idle = (statistics.median(sides[side]) for side in (NAME, *IDLE))
        lines.append(f"| {protocol} | {gateway:,.0f} |" + "".join(f" {rate:,.0f} | {gateway / rate:.2f} |" for rate in idle))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--messages", type=int, default=NUM_MESSAGES)
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    given = parser.parse_args()
    rates = measure(given.messages, given.turns)
    print(table(rates))
    for protocol, sides in rates.items():
        print(protocol, {side: [round(rate) for rate in turns] for side, turns in sides.items()})
    if given.write:
        text = (
            f"{NUM_STREAMS} streams of {given.messages} messages at once, {given.turns} turns, medians. {machine()}.\n\n{table(rates)}\n\n"
            "In steps: a message for every stream each 2.5 ms, as the gateway gets its tokens; at once: without ever waiting, "
            "so that a whole stream is a few pieces of work for Serve. Streams open and close within the time, which is a third to "
            "a half of it over HTTP."
        )
        write_section("Ingress", text)


if __name__ == "__main__":
    main()
