"""GenerateBatch: many requests over one call, each in a task of its own, their answers interleaved by id."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from cluster.api.errors import STATUSES, Problem, describe
from cluster.api.grpc_messages import error_message
from cluster.api.proto.shoal.v1 import inference_pb2
from router.errors import InvalidRequest

MAX_OPEN = 128  # requests of one call; as the .proto says
MAX_ID_CHARS = 128
MAX_READY = 4096  # messages that wait for Serve to take them; at most this many come together after a rest (StreamPace)
CANCELLED = Problem("cancelled", "The client ended this request.", None, STATUSES["cancelled"])

Answer = Callable[[Any, str], AsyncGenerator[list[Any], None]]  # of one BatchRequest, by a request id of its own


class Batch:
    """One call. `answer` gives a request's Deltas or raises what it failed of.

    InvalidRequest, which ends the call, for an id that cannot be told apart from others: nobody could be answered.
    """

    def __init__(self, answer: Answer, request_id: str, max_open: int = MAX_OPEN) -> None:
        self._answer = answer
        self._request_id = request_id
        self._places = asyncio.Semaphore(max_open)
        self._ready: asyncio.Queue[Any] = asyncio.Queue(MAX_READY)
        self._open: dict[str, asyncio.Task[None]] = {}
        self._answering: set[str] = set()  # those of them that a client can still cancel
        self._is_closed = False
        self._num_requests = 0

    async def run(self, requests: AsyncIterator[Any]) -> AsyncGenerator[list[Any], None]:
        """BatchResponses, all that are ready at a time, until `requests` has ended and all are answered. Closing it ends every request."""
        reader = asyncio.create_task(self._read(requests))
        try:
            response = await self._ready.get()
            while response is not None:
                responses = []
                while response is not None:  # the end: no more is taken, though requests may still say something
                    responses.append(response)
                    if self._ready.empty():
                        break
                    response = self._ready.get_nowait()
                yield responses
                if response is not None:
                    response = await self._ready.get()
            await reader  # raises what ended it
        finally:
            self._is_closed = True
            tasks = {reader, *self._open.values()}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        """No further than there are places: the client then waits."""
        try:
            async for request in requests:
                if request.WhichOneof("request") == "cancel":
                    self._cancel(request.id)
                    continue
                self._check_id(request.id)
                await self._places.acquire()
                self._num_requests += 1
                self._answering.add(request.id)
                self._open[request.id] = asyncio.create_task(self._run(request, f"{self._request_id}-{self._num_requests}"))
                await asyncio.sleep(0)  # so that it has begun before the client can cancel it: a task that has not never ends its request
            while self._open:
                await asyncio.wait(self._open.values())
        finally:
            await self._put(None)

    def _cancel(self, request_id: str) -> None:
        if request_id in self._answering:
            self._answering.remove(request_id)
            self._open[request_id].cancel()

    def _check_id(self, request_id: str) -> None:
        if not 1 <= len(request_id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"id: must have 1 to {MAX_ID_CHARS} characters.", field="id")
        if request_id in self._open:
            raise InvalidRequest("id: a request with this id is open on this call.", field="id")

    async def _run(self, request: Any, request_id: str) -> None:
        """One request, to its last response."""
        failure: Problem | None = None
        try:
            await self._send_deltas(request, request_id)
        except asyncio.CancelledError:
            failure = CANCELLED  # by the client, or with the call, where nobody reads it
        except Exception as error:
            failure = describe(error, request_id)
        self._answering.discard(request.id)
        if failure is not None:
            await self._put(inference_pb2.BatchResponse(id=request.id, error=error_message(failure), last=True))
        del self._open[request.id]
        self._places.release()

    async def _send_deltas(self, request: Any, request_id: str) -> None:
        num_left = num_answers(request)
        async with aclosing(self._answer(request, request_id)) as batches:
            async for deltas in batches:
                for delta in deltas:
                    num_left -= delta.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
                    if num_left == 0:
                        self._answering.discard(request.id)  # from here on it has its last response
                    await self._put(inference_pb2.BatchResponse(id=request.id, delta=delta, last=num_left == 0))

    async def _put(self, response: Any) -> None:
        if not self._is_closed:
            await self._ready.put(response)


def num_answers(request: Any) -> int:
    """How many a BatchRequest asks for."""
    wanted = getattr(request, request.WhichOneof("request") or "generate")
    return int(wanted.n) if wanted.HasField("n") else 1
