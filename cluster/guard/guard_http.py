"""`GET /cluster/guard`: what the gateway that answers knows of its guard, for an operator."""

from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from cluster.api.connection import json_response
from cluster.guard.guard import Guard


def add_guard(app: FastAPI, guard: Guard | None) -> None:
    """Adds the route."""

    @app.get("/cluster/guard")
    async def show_guard() -> Response:
        """Whether keys are asked for, how many hold, where use is counted, and what is wrong with the keys file if something is."""
        return json_response(guard_view(guard))


def guard_view(guard: Guard | None) -> dict[str, Any]:
    """As JSON has it."""
    if guard is None:
        return {"asks_for_keys": False, "num_keys": 0, "limits_hold_for": None, "problem": None}
    return {"asks_for_keys": True, "num_keys": guard.num_keys, "limits_hold_for": guard.counts.name, "problem": guard.problem}
