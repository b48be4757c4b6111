"""A real gateway whose router replays tokens, and Serve applications that do nothing: the sides of `ingress`."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.responses import StreamingResponse

from actors.exchange import Registry, RouterEntry
from actors.process import node_id
from cluster.api.proto.shoal.v1 import inference_pb2
from cluster.config import GatewaySettings, SecuritySettings
from cluster.gateway_replica import GatewayReplica, GatewaySetup
from router import wire
from router.placement_map import HostKey
from router.request import Delta, Request
from router.transport.listener import Listener

SECRET = b"replayed"
MAX_MODEL_LEN = 4096
FIRST_TOKEN, NUM_TOKENS = 34, 58  # the ids that are replayed: each is a letter or a sign
NOTHING = "nothing.Nothing"
MESSAGE = inference_pb2.Delta(request_id="0" * 32, text=" word", token_ids=[1234])
EVENT = b'data: {"id":"cmpl-' + b"0" * 32 + b'","object":"text_completion","created":1700000000,"model":"replayed","choices":['
EVENT += b'{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'


class ReplayingCoordinator:
    """Knows one router, which it is itself: every `step_s` each open request gets one token, in one message per gateway.

    None: a request gets all its tokens at once, in a delta each.
    """

    def __init__(self, application: str, step_s: float | None) -> None:
        self._step_s = step_s
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Any, int, int]] = {}  # connection, tokens said, tokens wanted
        self._listener = Listener(SECRET, application, node_id(), on_message=self._on_message, on_message_close=self._on_close)
        if step_s is not None:
            threading.Thread(target=self._replay, args=(step_s,), daemon=True).start()

    async def registry(self, *_: Any) -> Registry:
        """What a gateway asks for."""
        key = HostKey("replay", 1)
        return Registry((RouterEntry(key, self._listener.endpoint, {"max_model_len": float(MAX_MODEL_LEN)}),), is_complete=True)

    def _on_message(self, connection: Any, message: dict[str, Any]) -> None:
        with self._lock:
            if "submit" in message:
                request = Request.model_validate(message["submit"])
                wanted = request.sampling.max_tokens
                if self._step_s is None:
                    connection.send(wire.deltas_to_wire([_delta(request.request_id, said, wanted) for said in range(wanted)]))
                else:
                    self._open[request.request_id] = (connection, 0, wanted)
            elif "cancel" in message:
                self._open.pop(message["cancel"], None)

    def _on_close(self, connection: Any) -> None:
        with self._lock:
            self._open = {key: entry for key, entry in self._open.items() if entry[0] is not connection}

    def _replay(self, step_s: float) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + step_s, time.monotonic())
            time.sleep(max(0.0, next_s - time.monotonic()))
            outgoing: dict[int, tuple[Any, list[Delta]]] = {}
            with self._lock:
                for key, (connection, said, wanted) in list(self._open.items()):
                    outgoing.setdefault(id(connection), (connection, []))[1].append(_delta(key, said, wanted))
                    if said + 1 == wanted:
                        del self._open[key]
                    else:
                        self._open[key] = (connection, said + 1, wanted)
            for connection, deltas in outgoing.values():
                connection.send(wire.deltas_to_wire(deltas))


def _delta(request_id: str, said: int, wanted: int) -> Delta:
    return Delta(request_id, (FIRST_TOKEN + said % NUM_TOKENS,), finish="length" if said + 1 == wanted else None)


def replayed(checkpoint: Path, name: str, step_s: float | None) -> Application:
    """The gateway as it is deployed, over the replaying router."""
    coordinator = serve.deployment(name="Coordinator", max_ongoing_requests=1000)(ReplayingCoordinator).bind(name, step_s)
    settings = GatewaySettings()
    setup = GatewaySetup(name, str(checkpoint), SECRET, settings, exchange_interval_s=1.0, security=SecuritySettings(insecure=True))
    gateway = serve.deployment(name="Gateway", max_ongoing_requests=settings.max_ongoing_requests)(serve.ingress()(GatewayReplica))
    return gateway.bind(setup, coordinator, [])


_http = FastAPI()


@serve.deployment(name="Nothing", max_ongoing_requests=2000)
@serve.ingress(_http)
class Nothing:
    """Streams one message again and again, by gRPC and by HTTP: at once, or where `step_s` is given one each time that passes."""

    def __init__(self, step_s: float | None) -> None:
        self._step_s = step_s
        self._num_steps = 0
        self._stepped = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    async def Stream(self, request: Any) -> AsyncIterator[Any]:
        """GenerateRequest -> Deltas."""
        async for _ in self._steps(request.sampling.max_tokens):
            yield MESSAGE

    @_http.post("/v1/completions")
    async def complete(self, body: dict[str, Any]) -> StreamingResponse:
        """Server-sent events."""

        async def events() -> AsyncIterator[bytes]:
            async for _ in self._steps(body["max_tokens"]):
                yield EVENT

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _steps(self, num: int) -> AsyncIterator[None]:
        if self._step_s is None:
            for _ in range(num):
                yield
            return
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step(self._step_s))
        first = self._num_steps
        for wanted in range(first + 1, first + num + 1):
            while self._num_steps < wanted:
                await self._stepped.wait()
            yield

    async def _step(self, step_s: float) -> None:
        clock = asyncio.get_running_loop().time
        next_s = clock()
        while True:
            next_s = max(next_s + step_s, clock())
            await asyncio.sleep(next_s - clock())
            self._num_steps += 1
            self._stepped.set()
            self._stepped = asyncio.Event()


def add_nothing(servicer: Any, server: Any) -> None:
    """Serve's way to `Nothing.Stream`, with nothing of ours on it."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.Stream,
        request_deserializer=inference_pb2.GenerateRequest.FromString,
        response_serializer=inference_pb2.Delta.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NOTHING, {"Stream": handler}),))
