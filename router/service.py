"""The router's own loop: requests in from gateways, engine steps, one message per step and gateway out."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from pydantic import ValidationError

from router import wire
from router.dispatch import DistributedExperts
from router.engine import Engine
from router.errors import RequestError
from router.placement_map import PlacementMap
from router.request import Delta, Failure, Request

logger = logging.getLogger("shoal")


class Connection(Protocol):
    """A gateway's end as the router sees it: sending never blocks."""

    def send(self, message: wire.Wire) -> None:
        """Queues a message; a gateway that does not read loses its connection, never slows the engine."""
        ...


class RouterService:
    """Holds the engine's thread. The other threads only put messages into its inbox.

    `latest_map` gives the newest published map or None; it is adopted between two steps.
    """

    def __init__(self, engine: Engine, experts: DistributedExperts | None, latest_map: Callable[[], PlacementMap | None]) -> None:
        self._engine = engine
        self._experts = experts
        self._latest_map = latest_map
        self._inbox: queue.SimpleQueue[tuple[Connection | None, wire.Wire]] = queue.SimpleQueue()
        self._connections: dict[str, Connection] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def on_message(self, connection: Connection, message: wire.Wire) -> None:
        """A gateway submits or cancels. Any thread."""
        self._inbox.put((connection, message))

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
        while not self._closed:
            self._read_inbox(wait=not self._engine.has_work)
            self._adopt()
            if self._engine.has_work:
                self._send(self._engine.step())

    def _adopt(self) -> None:
        latest = self._latest_map()
        if self._experts is not None and latest is not None:
            self._experts.adopt(latest)

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

    def _handle(self, connection: Connection | None, message: dict[str, Any]) -> None:
        if connection is None:
            return
        if "submit" in message:
            self._submit(connection, message["submit"])
        elif "cancel" in message:
            self._connections.pop(message["cancel"], None)
            self._engine.cancel(message["cancel"])
        elif "gone" in message:
            for request_id in [key for key, owner in self._connections.items() if owner is connection]:
                del self._connections[request_id]
                self._engine.cancel(request_id)

    def _submit(self, connection: Connection, fields: dict[str, Any]) -> None:
        request_id = str(fields.get("request_id"))
        try:
            self._engine.add(Request.model_validate(fields))
        except (RequestError, ValidationError) as error:
            kind = error.kind if isinstance(error, RequestError) else "invalid_request"
            failure = Failure(kind, str(error), getattr(error, "field", None))
            connection.send(wire.deltas_to_wire([Delta(request_id, finish="error", failure=failure)]))
        else:
            self._connections[request_id] = connection

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
            connection.send(wire.deltas_to_wire(its))
