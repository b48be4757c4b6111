"""The OpenAPI document: answers and errors of each endpoint, and nothing that the endpoints do not do."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from cluster.api.answers import ChatCompletionChunk, ErrorAnswer, ResponseEvent

TIMEOUT_HEADER = "X-Request-Timeout-S"
REFUSALS = {
    400: "The request is wrong: `param` names the field.",
    401: "No key, or one that is not known.",
    403: "The key is not for this.",
    404: "There is no such model.",
    408: "The deadline of the request passed.",
    413: "The body is too large.",
    429: "Too much at once: try again after `retry-after` seconds.",
    500: "The server's own fault; its log says more.",
    503: "Experts or routers are away for the moment: try again after `retry-after` seconds.",
}
HEADERS = (
    (TIMEOUT_HEADER, "Seconds until the request is given up, from its arrival.", {"type": "number", "exclusiveMinimum": 0}),
    ("X-Request-Id", "Names the request in answers and logs; one is made if it is left out.", {"type": "string"}),
    ("traceparent", "W3C trace context.", {"type": "string"}),
)
HTTP_METHODS = ("get", "post", "patch", "put", "delete")


def answers(schema: type[BaseModel], *, streams: type[BaseModel] | None = None, status: int = 200) -> dict[str, Any]:
    """A route's arguments that describe what it answers. `streams`: the data of each event, where it can stream."""
    good: dict[str, Any] = {"model": schema, "description": "The answer."}
    if streams is not None:
        good["description"] = "The answer; with `stream`, server-sent events whose data is of the second schema, or an error."
        event = {"schema": {"type": "string", "x-event-schema": {"$ref": f"#/components/schemas/{streams.__name__}"}}}
        good["content"] = {"text/event-stream": event}
    return {"responses": {status: good}}


def describe_api(app: FastAPI) -> None:
    """Makes `app` answer /openapi.json with the document, and /docs with a page that reads it and nothing from elsewhere."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    page = files("cluster.api").joinpath("static/docs.html").read_bytes()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(page, media_type="text/html", headers={"x-content-type-options": "nosniff"})


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (ErrorAnswer, ChatCompletionChunk, ResponseEvent):  # which no route answers with as they are
        _add_schema(schemas, model)
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for path in document["paths"].values():
        for method in HTTP_METHODS:
            operation = path.get(method)
            if operation is None:
                continue
            operation["responses"].pop("422", None)
            for status, meaning in REFUSALS.items():
                operation["responses"].setdefault(str(status), {"description": meaning, "content": error})
            operation.setdefault("parameters", []).extend(
                {"name": name, "in": "header", "required": False, "description": meaning, "schema": schema}
                for name, meaning, schema in HEADERS
            )
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "Where keys are configured."}}
    document["security"] = [{}, {"key": []}]
    return document


def _add_schema(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, definition in schema.pop("$defs", {}).items():
        schemas.setdefault(name, definition)
    schemas.setdefault(model.__name__, schema)
