"""The client's end of an HTTP call: its request id, and whether it is still there."""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.errors import describe
from cluster.api.rendering import dumps
from cluster.api.trace_context import TRACEPARENT, parse
from router.errors import RequestCancelled

REQUEST_ID = "x-request-id"
T = TypeVar("T")


def request_id_of(given: str | None) -> str:
    """The client's id if it is one that can stand in a header and a log line, else a new one."""
    return given if given is not None and re.fullmatch(r"[!-~]{1,128}", given) else uuid.uuid4().hex


class RequestIds:
    """ASGI middleware: every call has an id, in `scope["state"]["request_id"]` and (if `echo`) in the response's headers.

    A client's W3C trace context is beside it as `trace` (None without one), and always echoed: no proxy does that for us.
    It is also where an exception that nobody foresaw ends: as a 500 that names the id, and nothing else.
    """

    def __init__(self, app: ASGIApp, *, echo: bool = True) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        request_id = request_id_of(given.get(REQUEST_ID))
        trace = parse(given.get(TRACEPARENT))
        scope.setdefault("state", {}).update(request_id=request_id, trace=trace)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._echo:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
                if trace is not None:
                    MutableHeaders(scope=message)[TRACEPARENT] = trace.as_text()
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            problem = describe(error, request_id)
            if not started:
                await json_response(problem.openai_body(), problem.status.http)(scope, receive, send_with_id)


def json_response(value: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(dumps(value), status_code, dict(headers or {}), "application/json")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first: then RequestCancelled."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("The client went away.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A body of server-sent events, of which each item is one or several. `events` is closed when the body ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """One ASGI call."""
        with suppress(RequestCancelled):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for events in self._events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
