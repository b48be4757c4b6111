"""What all JSON bodies share: exact types, no unknown fields, and one sentence that names the field at fault."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict

from router.errors import InvalidRequest


class Schema(BaseModel):
    """Types are exact: no number is read out of a string, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def invalid_body(error: RequestValidationError) -> InvalidRequest:
    """FastAPI's finding as one sentence that names the field."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    location = _location(first)
    if location is None:
        return InvalidRequest("The body must be a JSON object, with the header content-type: application/json.")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{location}: there is no such field; leave it out.", field=location)
    if first["type"] == "none_required":
        return InvalidRequest(f"{location}: is not served here; leave it out.", field=location)
    reasons = dict.fromkeys(problem["msg"] for problem in problems if _location(problem) == location)
    return InvalidRequest(f"{location}: {', or '.join(reasons)}.", field=location)


def _location(problem: Mapping[str, Any]) -> str | None:
    """The path that a client would write. Pydantic's starts with `body` and goes on into the members of unions."""
    known = field_names(Schema)
    path = ""
    for part in problem["loc"][1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in known or problem["type"] == "extra_forbidden":
            path += f".{part}" if path else part
        else:
            break
    return path or None


def field_names(schema: type[BaseModel]) -> frozenset[str]:
    """Of the schema and all that are made from it."""
    derived: Iterable[type[BaseModel]] = schema.__subclasses__()
    own = (field.alias or name for name, field in schema.model_fields.items())
    return frozenset(own).union(*(field_names(one) for one in derived))
