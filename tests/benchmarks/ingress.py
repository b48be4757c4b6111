"""Stream messages a second through Serve's ingress, one gateway against an application that does nothing.

    python -m tests.benchmarks.ingress [--write]

All are applications of one Serve, on one Ray of one machine, and take turns: gRPC and HTTP, 64 streams at once, each with the
same number of messages. The gateway is the deployed one; its router replays tokens, either one for every stream each 2.5 ms, 25,600 a
second in all, or all of a stream at once. The other application yields one ready message again and again, at the same times.
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
CADENCES = {"in steps": STEP_S, "at once": None}  # seconds between two messages of a stream
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
    body = json.dumps({"model": application, "prompt": [5, 6, 7], "max_tokens": num_messages, "ignore_eos": True, "stream": True}).encode()
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
    """Messages a second by protocol and cadence, then by side, one for each turn."""
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
            ways: dict[str, dict[str, Callable[[int], Awaitable[int]]]] = {}
            for number, (cadence, step_s) in enumerate(CADENCES.items()):
                idle, gateway = f"nothing-{number}", f"replayed-{number}"
                serve.run(Nothing.bind(step_s), name=idle, route_prefix=f"/{idle}")
                serve.run(replayed(checkpoint, gateway, step_s), name=gateway, route_prefix=f"/{gateway}")
                over_grpc = partial(grpc_streams, f"127.0.0.1:{grpc_port}")
                ways[f"gRPC, {cadence}"] = {
                    "gateway": partial(over_grpc, gateway, "/shoal.v1.Inference/Generate"),
                    "nothing": partial(over_grpc, idle, f"/{NOTHING}/Stream"),
                }
                ways[f"HTTP, {cadence}"] = {
                    side: partial(http_streams, http_port, app) for side, app in (("gateway", gateway), ("nothing", idle))
                }
            for both in ways.values():
                for way in both.values():
                    asyncio.run(way(4))
            rates: dict[str, dict[str, list[float]]] = {kind: {side: [] for side in both} for kind, both in ways.items()}
            for _ in range(num_turns):
                for kind, both in ways.items():
                    for side, way in both.items():
                        rate = messages_per_s(lambda way=way: way(num_messages), NUM_STREAMS * num_messages * 9 // 10)
                        rates[kind][side].append(rate)
            return rates
        finally:
            serve.shutdown()
            ray.shutdown()


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and what share of the idle application's the gateway's is."""
    lines = ["| messages/s | one gateway | an application that does nothing | share |", "| --- | --- | --- | --- |"]
    for kind, sides in rates.items():
        gateway, nothing = statistics.median(sides["gateway"]), statistics.median(sides["nothing"])
        lines.append(f"| {kind} | {gateway:,.0f} | {nothing:,.0f} | {gateway / nothing:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--messages", type=int, default=NUM_MESSAGES)
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    given = parser.parse_args()
    rates = measure(given.messages, given.turns)
    print(table(rates))
    for kind, sides in rates.items():
        print(kind, {side: [round(rate) for rate in turns] for side, turns in sides.items()})
    if given.write:
        text = (
            f"{NUM_STREAMS} streams of {given.messages} messages at once, {given.turns} turns, medians. {machine()}.\n\n{table(rates)}\n\n"
            f"In steps: a message for every stream each {1e3 * STEP_S:g} ms, as a router's tokens come; at once: all of a stream as it "
            "opens, so that it is a few pieces of work for Serve. Streams open and close within the time, which is a third to a half of it "
            "over HTTP."
        )
        write_section("Ingress", text)


if __name__ == "__main__":
    main()
