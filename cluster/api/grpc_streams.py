"""Handlers of Serve's gRPC server, made safe for clients: cancellation that always arrives, statuses without stack traces.

Serve (2.60) answers a stream from an async generator, and grpc closes none that is suspended in a `yield` when the client goes
away: about every second call that is cancelled while messages flow would run on in the replica to its end. Here the
generator is read by a task that never waits for the client, so it is suspended where a cancellation reaches the replica.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.api.connection import REQUEST_ID, request_id_of
from cluster.api.errors import STATUSES, Problem
from cluster.api.grpc_status import CODES, KIND, error_metadata, problem_of_serve, text_of
from cluster.api.packing import unpack

logger = logging.getLogger("shoal")

# A call with so many answers that the client has not read yet takes no further request.
MAX_UNREAD = 256  # messages
StreamHandler = Callable[[Any, Any], AsyncGenerator[bytes, None]]
UnaryHandler = Callable[[Any, Any], Awaitable[bytes]]
MALFORMED = Problem("invalid_request", "The message cannot be read: it is not what the .proto says.", None, STATUSES["invalid_request"])


class Malformed:
    """Stands for a message that cannot be parsed: an exception there would be told to the client as it is."""


def forgiving(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that never raises."""

    def read(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return Malformed()

    return read


def unary(handler: UnaryHandler) -> UnaryHandler:
    """The same handler for a call with one answer."""

    async def answer(request: Any, context: Any) -> bytes:
        if isinstance(request, Malformed):
            _refuse(context, MALFORMED)
            return b""
        response = b""
        try:
            response = await handler(request, context)
        except Exception:
            _note_failure(context)
        _tidy(context)
        return response

    return answer


def cancellable(handler: StreamHandler) -> Callable[[Any, Any], Any]:
    """The same handler in grpc.aio's writing style. It returns only when `handler` has ended: that one uses `context` to the last."""

    async def write_stream(request: Any, context: Any) -> None:
        if isinstance(request, Malformed):
            _refuse(context, MALFORMED)
            return
        # Unbounded as Serve's own stream to the proxy is; the bound is the answer's max_tokens.
        messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        reader = asyncio.create_task(_read(handler(request, context), messages, context))
        try:
            while (message := await messages.get()) is not None:
                await context.write(message)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait({reader})
        _tidy(context)

    return write_stream


def conversing(handler: StreamHandler) -> Callable[[Any, Any], Any]:
    """The same for a call with a stream in both directions. While MAX_UNREAD answers wait for the client, none of its requests is read."""

    async def converse(requests: AsyncIterator[Any], context: Any) -> None:
        messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        intake = Intake(requests, messages)
        reader = asyncio.create_task(_read(handler(intake, context), messages, context))
        try:
            while (message := await messages.get()) is not None:
                await context.write(message)
                intake.look()
            if not intake.is_malformed:
                await reader
        finally:
            intake.close()
            reader.cancel()
            await asyncio.wait({reader, intake.task})
        if intake.is_malformed:
            _refuse(context, MALFORMED)
        _tidy(context)

    return converse


class Intake:
    """The client's messages, read one ahead, and only while few answers wait. It ends with the call, whoever still reads it."""

    def __init__(self, requests: AsyncIterator[Any], messages: asyncio.Queue[bytes | None]) -> None:
        self.is_malformed = False
        self._messages = messages
        self._few_wait = asyncio.Event()
        self._few_wait.set()
        self._incoming: asyncio.Queue[Any] = asyncio.Queue(1)  # None: the end
        self.task = asyncio.create_task(self._read(requests))

    def __aiter__(self) -> "Intake":
        return self

    async def __anext__(self) -> Any:
        item = await self._incoming.get()
        if item is None:
            self._end()
            raise StopAsyncIteration
        return item

    def look(self) -> None:
        """How many answers wait has changed."""
        if self._messages.qsize() <= MAX_UNREAD:
            self._few_wait.set()
        else:
            self._few_wait.clear()

    def close(self) -> None:
        """Nothing more is read."""
        self.task.cancel()
        self._end()

    def _end(self) -> None:
        while not self._incoming.empty():
            self._incoming.get_nowait()
        self._incoming.put_nowait(None)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        try:
            async for request in requests:
                if isinstance(request, Malformed):
                    self.is_malformed = True
                    self._messages.put_nowait(None)
                    return
                await self._incoming.put(request)
                self.look()
                await self._few_wait.wait()
            await self._incoming.put(None)
        except Exception as error:  # the client has gone, whatever grpc calls it
            logger.debug("a client's stream ended: %s", error)
            self._end()


async def _read(stream: AsyncGenerator[bytes, None], messages: asyncio.Queue[bytes | None], context: Any) -> None:
    try:
        async for item in stream:
            for message in unpack(item):
                messages.put_nowait(message)
    except Exception:
        _note_failure(context)
    finally:
        messages.put_nowait(None)


def _note_failure(context: Any) -> None:
    logger.exception("Serve's handler failed")
    context.set_code(grpc.StatusCode.INTERNAL)


def _tidy(context: Any) -> None:
    """A status that is not of our methods is Serve's own, and told in our words."""
    code = context.code()
    code = code if isinstance(code, grpc.StatusCode) else CODES.get(code or 0, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.OK or any(key == KIND for key, _ in context.trailing_metadata() or ()):
        return
    _refuse(context, problem_of_serve(code, context.details() or ""))


def _refuse(context: Any, problem: Problem) -> None:
    request_id = request_id_of(dict(context.invocation_metadata() or ()).get(REQUEST_ID))
    context.set_code(problem.status.grpc)
    context.set_details(text_of(problem))
    context.set_trailing_metadata([(REQUEST_ID, request_id), *error_metadata(problem, request_id)])
