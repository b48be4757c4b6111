"""The page over HTTP: its files as they lie, and what it polls."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.api.connection import json_response
from cluster.api.control import ClusterControl
from cluster.config import DashboardSettings
from cluster.dashboard.data import dashboard_data, known_of

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, nobody's frame: a page that shows a cluster should be the last to be scripted by others.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
VIEW_AGE_S = 0.5  # pages that are open side by side share what the Coordinator says


@dataclass(frozen=True)
class PageFile:
    """One file of the page: `etag` is the digest of its bytes."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """By name; read once."""
    found = {}
    for entry in files("cluster.dashboard").joinpath("static").iterdir():
        ending = entry.name.rpartition(".")[2]
        if ending in MEDIA_TYPES:
            content = entry.read_bytes()
            found[entry.name] = PageFile(content, MEDIA_TYPES[ending], f'"{hashlib.sha256(content).hexdigest()[:24]}"')
    return found


class SharedView:
    """The Coordinator's view, asked for at most every VIEW_AGE_S however many pages are open. An error is nobody else's."""

    def __init__(self, control: ClusterControl, clock: Callable[[], float]) -> None:
        self._control = control
        self._clock = clock
        self._lock = asyncio.Lock()
        self._view: Mapping[str, Any] | None = None
        self._taken_s = 0.0

    async def take(self) -> Mapping[str, Any]:
        """Raises CoordinatorAway."""
        async with self._lock:
            if self._view is None or self._clock() - self._taken_s > VIEW_AGE_S:
                self._view = None
                self._view = await self._control.view()
                self._taken_s = self._clock()
            return self._view


def add_dashboard(
    app: FastAPI,
    control: ClusterControl,
    model: str,
    settings: DashboardSettings,
    wall_clock: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """GET /dashboard and its files, which need no key since they say nothing; GET /cluster/dashboard, which it polls.

    All addresses in the page are relative: it works under whatever prefix the application is served.
    """
    static, shared = page_files(), SharedView(control, clock)

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard(request: Request) -> Response:
        return _file(static["index.html"], request)

    @app.get("/dashboard/", include_in_schema=False)
    async def dashboard_with_slash() -> Response:
        """Its relative addresses are those of /dashboard."""
        return Response(status_code=307, headers={"location": "../dashboard"})

    @app.get("/dashboard/{name}", include_in_schema=False)
    async def dashboard_file(name: str, request: Request) -> Response:
        if name not in static:
            raise HTTPException(404, f"The dashboard has no file {name[:64]}")
        return _file(static[name], request)

    @app.get("/cluster/dashboard")
    async def cluster_dashboard(epoch: str | None = None, map_version: str | None = None, event: str | None = None) -> Response:
        """What the dashboard shows. `epoch`, `map_version` and `event` of the last answer leave out what was told then."""
        known = known_of(epoch, map_version, event)
        data = dashboard_data(await shared.take(), settings, model, wall_clock(), known)
        return json_response(data, headers={"cache-control": "no-store"})


def _file(file: PageFile, request: Request) -> Response:
    headers = HEADERS | {"etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers | {"content-type": f"{file.media_type}; charset=utf-8"})
