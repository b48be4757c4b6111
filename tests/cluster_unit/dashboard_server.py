"""The dashboard behind a real HTTP server and a route prefix, over a made-up cluster; each poll is a second later than the last."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from cluster.api.connection import json_response
from cluster.api.control import ClusterControl
from cluster.api.errors import describe
from cluster.config import DashboardSettings
from cluster.dashboard.page import add_dashboard
from cluster.errors import ClusterError
from tests.cluster_unit.made_up_views import STARTED_S, MadeUpCluster
from tests.free_ports import free_port

START_TIMEOUT_S = 10.0


class MadeUpCoordinator:
    """`seconds` is how long the cluster has run by now; `error` is raised instead of a view."""

    def __init__(self, cluster: MadeUpCluster) -> None:
        self.cluster = cluster
        self.error: Exception | None = None
        self.seconds = 0.0
        self._polls = itertools.count(1)

    async def view(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.seconds = float(next(self._polls))
        return self.cluster.view(self.seconds)


@dataclass
class DashboardServer:
    """Context manager; `url` is the page's. `stop` and `start` are a gateway's going away and coming back."""

    cluster: MadeUpCluster
    settings: DashboardSettings = field(default_factory=DashboardSettings)
    key: str | None = None
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.coordinator = MadeUpCoordinator(self.cluster)
        self._server: uvicorn.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/shallow/water/dashboard"

    @property
    def now_unix_s(self) -> float:
        return STARTED_S + self.coordinator.seconds

    def start(self) -> None:
        config = uvicorn.Config(self._app(), "127.0.0.1", self.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            assert self._thread.is_alive(), "the server ended"
            assert time.monotonic() < until, "the server did not start in time"
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(START_TIMEOUT_S)
            self._server = None

    def __enter__(self) -> "DashboardServer":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _app(self) -> Starlette:
        app = FastAPI()
        polls = itertools.count()
        control = ClusterControl(self.coordinator)
        add_dashboard(
            app,
            control,
            f"made-up-{self.cluster.num_layers}x{self.cluster.num_experts}",
            self.settings,
            lambda: self.now_unix_s,
            lambda: float(next(polls)),
        )
        app.add_exception_handler(ClusterError, _answer)
        app.middleware("http")(self._guard)
        return Starlette(routes=[Mount("/shallow/water", app)])

    async def _guard(self, request: Request, call_next: Any) -> Response:
        """As a gateway with keys: the page is open, what it polls is not."""
        is_open = self.key is None or "/cluster/" not in request.url.path
        if is_open or request.headers.get("authorization") == f"Bearer {self.key}":
            return await call_next(request)
        return json_response({"error": {"message": "This needs a key.", "code": "unauthenticated"}}, 401)


async def _answer(request: Request, error: Exception) -> Response:
    problem = describe(error, "id")
    return json_response(problem.openai_body(), problem.status.http)
