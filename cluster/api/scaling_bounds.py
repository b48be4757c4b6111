"""Bounds of scaling as an operator asks for them, and as they hold: what was set at run time over what is configured."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from cluster.api.schema import Schema
from cluster.config import AutoscalingSettings, ScalingSettings
from router.errors import InvalidRequest

MOST_REPLICAS = 100_000  # a bound against slips of the finger; the configured ceiling is the one that counts


class RoleBounds(Schema):
    """Bounds of one role. What is left out goes back to what is configured."""

    min_replicas: int | None = Field(None, ge=1, le=MOST_REPLICAS, description="Fewer do not run, whatever the load.")
    max_replicas: int | None = Field(None, ge=1, le=MOST_REPLICAS, description="More do not run; up to the configured ceiling.")


class ScalingBounds(Schema):
    """PATCH /cluster/scaling. A role that is left out keeps its bounds; `{}` brings back those configured."""

    expert_host: RoleBounds | None = None
    router: RoleBounds | None = None
    gateway: RoleBounds | None = None


def read_bounds(values: Mapping[str, Any]) -> ScalingBounds:
    """Plain values by role. Raises InvalidRequest naming the field."""
    try:
        return ScalingBounds.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{name}: {first['msg']}.", field=name) from error


def checked_bounds(wanted: ScalingBounds, configured: AutoscalingSettings | None) -> dict[str, dict[str, float]]:
    """What the Coordinator takes: {"expert_host": {"min_replicas": 2.0}}. `configured` None: not known, and not held against it.

    Raises InvalidRequest naming the field that no replica would ever follow.
    """
    roles = {role: bounds for role in ScalingBounds.model_fields if (bounds := getattr(wanted, role)) is not None}
    if not roles:
        raise InvalidRequest(f"The body must name a role: {', '.join(ScalingBounds.model_fields)}.")
    for role, bounds in roles.items():
        if bounds.min_replicas is None and bounds.max_replicas is None:
            continue  # back to what is configured
        limits: ScalingSettings | None = getattr(configured, role) if configured is not None else None
        if configured is not None and limits is None:
            raise _wrong(role, f"keeps a fixed number of replicas here: it has no branch `autoscaling.{role}` in the configuration")
        _check_order(role, bounds, limits)
    return {role: {name: float(bound) for name, bound in bounds if bound is not None} for role, bounds in roles.items()}


def bounds_in_force(by_role: Mapping[str, Mapping[str, float]], configured: AutoscalingSettings | None) -> dict[str, dict[str, Any]]:
    """By role that scales: `min_replicas`, `max_replicas`, `ceiling`, and `set_at_run_time` with what an operator has set."""
    view: dict[str, dict[str, Any]] = {}
    for role in ScalingBounds.model_fields:
        limits: ScalingSettings | None = getattr(configured, role) if configured is not None else None
        told = {name: int(bound) for name, bound in by_role.get(role, {}).items()}
        if limits is not None:
            upper = min(told.get("max_replicas", limits.max_replicas), limits.ceiling_replicas)
            lower = min(max(told.get("min_replicas", limits.min_replicas), limits.min_replicas), upper)
            view[role] = {"min_replicas": lower, "max_replicas": upper, "ceiling": limits.ceiling_replicas, "set_at_run_time": told}
        elif told:
            view[role] = {**told, "set_at_run_time": told}
    return view


def _check_order(role: str, bounds: RoleBounds, limits: ScalingSettings | None) -> None:
    lower, upper = bounds.min_replicas, bounds.max_replicas
    if limits is not None:
        floor, ceiling = limits.min_replicas, limits.ceiling_replicas
        for name, bound in bounds:
            if bound is not None and bound > ceiling:
                raise _wrong(f"{role}.{name}", f"{bound} is above the configured ceiling, {ceiling}")
            if bound is not None and bound < floor:
                raise _wrong(f"{role}.{name}", f"{bound} is below the configured min_replicas, {floor}: fewer never run")
        upper = limits.max_replicas if upper is None else upper
    if lower is not None and upper is not None and lower > upper:
        hint = "" if bounds.max_replicas is not None else ", as configured: set max_replicas too"
        raise _wrong(f"{role}.min_replicas", f"{lower} is above max_replicas, {upper}{hint}")


def _wrong(field: str, sentence: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {sentence}.", field=field)
