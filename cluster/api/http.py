"""OpenAI's API over HTTP, with the cluster's own beside it."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.api.answers import ModelEntry, ModelList, StatusAnswer
from cluster.api.cluster_http import add_cluster
from cluster.api.connection import RequestIds, json_response
from cluster.api.control import ClusterControl
from cluster.api.errors import NotReady, Problem, Status, describe
from cluster.api.generation_http import add_generation
from cluster.api.metrics_http import add_metrics
from cluster.api.openapi import answers, describe_api
from cluster.api.schema import invalid_body
from cluster.api.service import TextService
from cluster.api.tokenize_http import add_tokenize
from cluster.errors import ClusterError
from cluster.guard.http_guard import HttpGuard, HttpRules
from model.errors import ModelError
from router.errors import InvalidRequest, RouterError


def http_app(
    service: TextService,
    control: ClusterControl,
    is_ready: Callable[[], bool],
    *,
    echo_request_id: bool = True,
    rules: HttpRules = HttpRules(),  # noqa: B008 - frozen
) -> FastAPI:
    """The ASGI application. `echo_request_id` False where a proxy in front sets the response's x-request-id itself."""
    app = FastAPI(title="Shoal", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(HttpGuard, rules=rules)
    app.add_middleware(RequestIds, echo=echo_request_id)
    for kind in (RouterError, ModelError, ClusterError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    _add_models(app, service)
    add_generation(app, service)
    add_tokenize(app, service)
    _add_probes(app, is_ready)
    add_cluster(app, control)
    add_metrics(app, control)
    describe_api(app)
    return app


def _add_models(app: FastAPI, service: TextService) -> None:
    def entry() -> dict[str, Any]:
        served = {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "shoal"}
        return served | {"max_model_len": service.max_model_len}

    @app.get("/v1/models", tags=["models"], **answers(ModelList))
    async def list_models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{model_id:path}", tags=["models"], **answers(ModelEntry))
    async def get_model(model_id: str) -> Response:
        """One model by its id."""
        service.check_model(model_id)
        return json_response(entry())


def _add_probes(app: FastAPI, is_ready: Callable[[], bool]) -> None:
    @app.get("/health", tags=["probes"], **answers(StatusAnswer))
    async def health() -> Response:
        """Whether the gateway lives."""
        return json_response({"status": "ok"})

    @app.get("/ready", tags=["probes"], **answers(StatusAnswer))
    async def ready() -> Response:
        """Whether it can answer: 503 until a complete placement map is adopted."""
        if not is_ready():
            raise NotReady("The gateway has no complete placement map yet; ask again.")
        return json_response({"status": "ready"})


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


async def _answer_error(request: Request, error: Exception) -> Response:
    problem = _http_problem(error, _request_id(request))
    return json_response(problem.openai_body(), problem.status.http, problem.status.headers)


def _http_problem(error: Exception, request_id: str) -> Problem:
    if isinstance(error, RequestValidationError):
        return describe(invalid_body(error), request_id)
    if not isinstance(error, HTTPException):
        return describe(error, request_id)
    if error.status_code == 400:  # FastAPI's word for a body that is no JSON text at all
        return describe(InvalidRequest("The body cannot be read: it must be JSON in UTF-8."), request_id)
    kinds = {404: "not_found", 405: "method_not_allowed"}
    status = Status(error.status_code, StatusCode.UNKNOWN, "invalid_request_error", dict(error.headers or {}))
    return Problem(kinds.get(error.status_code, "invalid_request"), f"{error.detail}.", None, status)
