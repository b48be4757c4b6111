"""The real engine where the front door expects the routers, in one process."""

import asyncio
from collections.abc import Callable

from router.engine import Engine
from router.request import Delta, Request


class EngineRouter:
    """Steps the engine in a thread while anybody waits; a request whose caller is cancelled is cancelled."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._streams: dict[str, asyncio.Queue[Delta]] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        self.engine.add(request)
        deltas = self._streams[request.request_id] = asyncio.Queue()
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            finish = None
            while finish is None:
                delta = await deltas.get()
                on_delta(delta)
                finish = delta.finish
        finally:
            del self._streams[request.request_id]

    async def _step(self) -> None:
        while self.engine.has_work:
            for delta in await asyncio.to_thread(self.engine.step):
                if delta.request_id in self._streams:
                    self._streams[delta.request_id].put_nowait(delta)
            for request_id in set(self.engine._sequences) - set(self._streams):
                self.engine.cancel(request_id)
