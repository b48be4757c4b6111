"""The guard as ASGI middleware: the key first, then the body, then the application."""

from dataclasses import dataclass, field

from starlette._utils import get_route_path  # the router's own reading of the path: by another one a guard could be walked around
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from cluster.api.connection import json_response
from cluster.api.errors import describe
from cluster.guard.body_bounds import BodyBounds, BodyReader
from cluster.guard.errors import GuardError
from cluster.guard.guard import Guard
from cluster.guard.keys import Scope

# What says nothing of anybody: probes, the API's description, a page without data.
OPEN = frozenset({"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/dashboard"})
OPEN_PREFIXES = ("/dashboard/",)
METRICS = "/metrics"
READING = ("GET", "HEAD")


def scope_of(method: str, path: str, *, open_metrics: bool) -> Scope | None:
    """What a key must be for; None: nobody is asked for one. Whatever is not known here is inference."""
    if path in OPEN or path.startswith(OPEN_PREFIXES) or (open_metrics and path == METRICS):
        return None
    if path == METRICS:
        return "any"
    if path == "/cluster" or path.startswith("/cluster/"):
        return "any" if method in READING else "operator"
    if method in READING and (path == "/v1/models" or path.startswith("/v1/models/")):
        return "any"
    return "inference"


@dataclass(frozen=True)
class HttpRules:
    """`guard` None: no key is asked for. Bodies are bounded all the same."""

    guard: Guard | None = None
    bounds: BodyBounds = field(default_factory=BodyBounds)
    open_metrics: bool = True


class HttpGuard:
    """Before all else but the request's id."""

    def __init__(self, app: ASGIApp, rules: HttpRules) -> None:
        self._app = app
        self._rules = rules
        self._bodies = BodyReader(rules.bounds)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._admit(scope)
            receive = await self._bodies.read(scope, receive)
        except GuardError as error:
            problem = describe(error, str(scope.get("state", {}).get("request_id", "")))
            await json_response(problem.openai_body(), problem.status.http, problem.status.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _admit(self, scope: AsgiScope) -> None:
        wanted = scope_of(scope["method"], get_route_path(scope), open_metrics=self._rules.open_metrics)
        if self._rules.guard is not None and wanted is not None:
            await self._rules.guard.admit(Headers(scope=scope).get("authorization"), wanted)
