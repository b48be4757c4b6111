"""The cluster over HTTP: what it is doing, and an operator's hands, which return at once with an operation to follow."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from cluster.api.cluster_parts import PARTS, whole
from cluster.api.connection import json_response
from cluster.api.control import ClusterControl, Operation
from cluster.api.scaling_bounds import ScalingBounds

OPEN_STATES = ("pending", "running")


def add_cluster(app: FastAPI, control: ClusterControl) -> None:
    """GET /cluster (everything), /cluster/status (without the tables by expert) and the parts; the operations."""
    app.add_api_route("/cluster", _shows(control, whole), methods=["GET"], name="cluster")
    for name, part in PARTS.items():
        app.add_api_route(f"/cluster/{name}", _shows(control, part), methods=["GET"], name=f"cluster_{name}")

    @app.post("/cluster/rebalance", status_code=202)
    async def rebalance(request: Request) -> Response:
        """The best placement there is, whatever it costs to move."""
        return _begun(request, await control.rebalance())

    @app.post("/cluster/hosts/{host_id:path}/drain", status_code=202)
    async def drain(host_id: str, request: Request) -> Response:
        """A host without experts; 404 for one that does not live."""
        return _begun(request, await control.drain(host_id))

    @app.patch("/cluster/scaling", status_code=202)
    async def set_scaling(body: ScalingBounds, request: Request) -> Response:
        """Bounds by role; those of a role are replaced as a whole."""
        return _begun(request, await control.set_scaling(body))

    @app.get("/cluster/operations/{operation_id:path}")
    async def operation(operation_id: str) -> Response:
        """What has become of it."""
        found = await control.operation(operation_id)
        return json_response(found, headers=_patience(found))


def _shows(control: ClusterControl, part: Callable[[Mapping[str, Any]], Any]) -> Callable[[], Awaitable[Response]]:
    async def show() -> Response:
        return json_response(part(await control.view()))

    return show


def _begun(request: Request, operation: Operation) -> Response:
    """The operation and where to follow it, under whatever prefix the application is served."""
    location = f"{request.scope.get('root_path', '')}/cluster/operations/{operation['id']}"
    return json_response(operation, 202, {"location": location, **_patience(operation)})


def _patience(operation: Operation) -> Mapping[str, str]:
    return {"retry-after": "1"} if operation["state"] in OPEN_STATES else {}
