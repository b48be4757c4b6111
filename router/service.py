"""The router's own loop: requests in from gateways, engine steps, one message per step and gateway out."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from pydantic import ValidationError

from router import wire
from router.constraint_matcher import Matcher
from router.constraint_queue import MatcherQueue, Prepared
from router.dispatch import DistributedExperts
from router.engine import Engine
from router.errors import ChannelClosed, ChannelError, ChannelFull, InvalidRequest, QueueFull, RequestError
from router.placement_map import PlacementMap
from router.request import Delta, Failure, Request
from router.tracing import RequestTracer

logger = logging.getLogger("shoal")

# So many turns of the loop that fail in a row end the engine's thread, and the health check replaces the router.
MAX_FAILURES_IN_A_ROW = 5
# Messages of all gateways that wait for the end of a step. Submits have their own, lower limit: the engine's max_waiting.
MAX_INBOX = 1 << 16


class Connection(Protocol):
    """A gateway's end as the router sees it: sending never blocks."""

    def send(self, message: wire.Wire) -> None:
        """Queues a message; a gateway that does not read loses its connection, never slows the engine.

        FrameError for a message that no frame can carry.
        """
        ...

    def hang_up(self) -> None:
        """Ends the connection, so that the gateway turns to another router."""
        ...


class RouterService:
    """Holds the engine's thread. The other threads only put messages into its inbox.

    `latest_map` gives the newest published map or None; it is adopted between two steps.
    """

    def __init__(
        self,
        engine: Engine,
        experts: DistributedExperts | None,
        latest_map: Callable[[], PlacementMap | None],
        tracer: RequestTracer | None = None,
    ) -> None:
        self._engine = engine
        self._experts = experts
        self._latest_map = latest_map
        self._tracer = tracer
        self._inbox: queue.SimpleQueue[tuple[Connection | None, wire.Wire | Prepared]] = queue.SimpleQueue()
        self._matchers = None if engine.grammars is None else MatcherQueue(engine.grammars, lambda made: self._inbox.put((None, made)))
        self._arriving = threading.Lock()  # over the two that follow
        self._num_arriving = 0  # submits in the inbox
        self._has_ended = False
        self._connections: dict[str, Connection] = {}
        self._closed = False
        self.step_s = 0.0  # spent in steps since the start
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def on_message(self, connection: Connection, message: wire.Wire) -> None:
        """A gateway submits or cancels. Any thread. A full queue is answered here, whatever step the engine is in.

        ChannelError if the gateway is to be cut off: the engine has ended, or is sent more than it can ever read.
        """
        with self._arriving:
            if self._has_ended:
                raise ChannelClosed("the engine's thread ended")
            if self._inbox.qsize() >= MAX_INBOX:
                raise ChannelFull(f"{MAX_INBOX} messages of gateways wait for the engine already")
            is_submit = "submit" in message
            if not is_submit or self._num_arriving + self._num_waiting() < self._engine.config.max_waiting:
                self._num_arriving += is_submit
                self._inbox.put((connection, message))
                return
        full = QueueFull(f"{self._engine.config.max_waiting} requests wait already, the limit of this router: try again in a moment.")
        self._deliver(connection, [_failed(str(message["submit"].get("request_id")), Failure(full.kind, str(full)))])

    def on_close(self, connection: Connection) -> None:
        """A gateway is gone: its requests stop. Any thread."""
        self._inbox.put((connection, {"gone": True}))

    def wake(self) -> None:
        """There is a new map to look at. Any thread."""
        self._inbox.put((None, {}))

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step it is in. Idempotent."""
        self._closed = True
        self.wake()
        self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """False once the engine's thread ended, for the health check."""
        return self._thread.is_alive()

    def _run(self) -> None:
        num_failures = 0
        while not self._closed and num_failures < MAX_FAILURES_IN_A_ROW:
            try:
                self._turn()
                num_failures = 0
            except Exception:
                num_failures += 1
                logger.exception("the engine's loop failed, %d of at most %d times in a row", num_failures, MAX_FAILURES_IN_A_ROW)
        self._end()

    def _end(self) -> None:
        """Whoever still waits would do so for nothing; another router goes on."""
        with self._arriving:
            self._has_ended = True
        waiting: set[Connection | None] = set(self._connections.values())
        with suppress(queue.Empty):
            while True:
                waiting.add(self._inbox.get_nowait()[0])
        for connection in waiting:
            if connection is not None:
                connection.hang_up()
        if self._matchers is not None:
            self._matchers.close()

    def _num_waiting(self) -> int:
        return self._engine.load.num_waiting + (0 if self._matchers is None else len(self._matchers))

    def _turn(self) -> None:
        self._read_inbox(wait=not self._engine.has_work)
        latest = self._latest_map()
        if self._experts is not None and latest is not None:
            self._experts.adopt(latest)
        if self._engine.has_work:
            self._send(self._step())

    def _step(self) -> list[Delta]:
        started = time.perf_counter()
        if self._tracer is not None:
            self._tracer.step_begins()
        deltas = self._engine.step()
        if self._tracer is not None:
            self._tracer.step_ends()
            self._tracer.said(deltas)
        self.step_s += time.perf_counter() - started
        return deltas

    def _read_inbox(self, *, wait: bool) -> None:
        """Everything that has come; if `wait`, at least one message (close() sends one)."""
        while True:
            try:
                connection, message = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                self._handle(connection, message)
            except Exception:
                logger.exception("a gateway's message could not be handled")

    def _handle(self, connection: Connection | None, message: wire.Wire | Prepared) -> None:
        if isinstance(message, Prepared):
            self._prepared(message)
        elif connection is None:
            return
        elif "submit" in message:
            with self._arriving:
                self._num_arriving -= 1
            self._submit(connection, message["submit"])
        elif "cancel" in message:
            if self._connections.get(message["cancel"]) is connection:
                self._cancel(message["cancel"])
        elif "gone" in message:
            for request_id in [key for key, owner in self._connections.items() if owner is connection]:
                self._cancel(request_id)

    def _submit(self, connection: Connection, fields: dict[str, Any]) -> None:
        request_id = str(fields.get("request_id"))
        try:
            request = Request.model_validate(fields)
            if request_id in self._connections:
                raise InvalidRequest(f"A request with the id {request_id!r} runs already: choose another.", field="request_id")
            if request.sampling.constraint is not None and self._matchers is not None:
                self._matchers.add(request)
                self._connections[request_id] = connection
            else:
                self._admit(connection, request)
        except (RequestError, ValidationError) as error:
            kind = error.kind if isinstance(error, RequestError) else "invalid_request"
            self._deliver(connection, [_failed(request_id, Failure(kind, str(error), getattr(error, "field", None)))])

    def _prepared(self, prepared: Prepared) -> None:
        """A constrained request is back from the compiler, unless it was cancelled there."""
        if self._matchers is None or not self._matchers.take(prepared):
            return
        request_id, failure = prepared.request.request_id, prepared.failure
        connection = self._connections.pop(request_id)
        if failure is None:
            try:
                self._admit(connection, prepared.request, prepared.matcher)
            except RequestError as error:
                failure = Failure(error.kind, str(error), getattr(error, "field", None))
        if failure is not None:
            self._deliver(connection, [_failed(request_id, failure)])

    def _admit(self, connection: Connection, request: Request, matcher: Matcher | None = None) -> None:
        """Hands the request to the engine, with what the engine raises."""
        self._engine.add(request, matcher)
        self._connections[request.request_id] = connection
        if self._tracer is not None:
            self._tracer.began(request)

    def _cancel(self, request_id: str) -> None:
        self._connections.pop(request_id, None)
        if self._matchers is not None:
            self._matchers.cancel(request_id)
        self._engine.cancel(request_id)
        if self._tracer is not None:
            self._tracer.ended(request_id, "cancelled")

    def _send(self, deltas: list[Delta]) -> None:
        outgoing: dict[int, tuple[Connection, list[Delta]]] = {}
        for delta in deltas:
            connection = self._connections.get(delta.request_id)
            if connection is None:
                continue
            outgoing.setdefault(id(connection), (connection, []))[1].append(delta)
            if delta.finish is not None:
                del self._connections[delta.request_id]
        for connection, its in outgoing.values():
            self._deliver(connection, its)

    def _deliver(self, connection: Connection, deltas: list[Delta]) -> None:
        """One message; where no frame can carry it one per request, and a request whose own is too much fails alone."""
        try:
            connection.send(wire.deltas_to_wire(deltas))
        except ChannelError as error:
            if len(deltas) > 1:
                for delta in deltas:
                    self._deliver(connection, [delta])
                return
            logger.error("request %s: its answer cannot be sent: %s", deltas[0].request_id, error)
            if deltas[0].failure is None:
                self._cancel(deltas[0].request_id)
                message = f"The answer cannot be sent: {error}. If logprobs were asked for, ask for fewer."
                self._deliver(connection, [_failed(deltas[0].request_id, Failure("internal", message))])


def _failed(request_id: str, failure: Failure) -> Delta:
    return Delta(request_id, finish="error", failure=failure)
