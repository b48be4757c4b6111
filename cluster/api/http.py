"""OpenAI's API over HTTP, with the cluster's own beside it."""

import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.api.chat import ChatCompletionRequest, chat_call
from cluster.api.chat_rendering import ChatRendering
from cluster.api.cluster_http import add_cluster
from cluster.api.connection import EventStream, RequestIds, json_response, while_connected
from cluster.api.control import ClusterControl
from cluster.api.errors import NotReady, Problem, Status, describe
from cluster.api.metrics_http import add_metrics
from cluster.api.openai import CompletionRequest, completion_call
from cluster.api.rendering import CompletionRendering, Rendering, dumps, event, join
from cluster.api.schema import invalid_body
from cluster.api.service import Plan, TextDelta, TextService
from cluster.errors import ClusterError
from cluster.guard.http_guard import HttpGuard, HttpRules
from model.errors import ModelError
from router.errors import InvalidRequest, RouterError

TIMEOUT_HEADER = "X-Request-Timeout-S"


def http_app(
    service: TextService,
    control: ClusterControl,
    is_ready: Callable[[], bool],
    *,
    echo_request_id: bool = True,
    rules: HttpRules = HttpRules(),  # noqa: B008 - frozen
) -> FastAPI:
    """The ASGI application. `echo_request_id` False where a proxy in front sets the response's x-request-id itself."""
    app = FastAPI(title="Shoal", version="1")
    app.add_middleware(HttpGuard, rules=rules)
    app.add_middleware(RequestIds, echo=echo_request_id)
    for kind in (RouterError, ModelError, ClusterError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    _add_models(app, service)
    _add_generation(app, service)
    _add_probes(app, is_ready)
    add_cluster(app, control)
    add_metrics(app, control)
    return app


def _add_models(app: FastAPI, service: TextService) -> None:
    def entry() -> dict[str, Any]:
        served = {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "shoal"}
        return served | {"max_model_len": service.max_model_len}

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        service.check_model(model_id)
        return json_response(entry())


def _add_generation(app: FastAPI, service: TextService) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        call = completion_call(body, _request_id(request), _deadline_s(request), TIMEOUT_HEADER)
        plan = await service.plan(call)
        return await _generate(service, plan, CompletionRendering(body, plan, service.tokenizer), body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        call = chat_call(body, _request_id(request), _deadline_s(request), TIMEOUT_HEADER)
        plan = await service.plan(call)
        return await _generate(service, plan, ChatRendering(body, plan, service.tokenizer), body, request)


def _add_probes(app: FastAPI, is_ready: Callable[[], bool]) -> None:
    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if not is_ready():
            raise NotReady("The gateway has no complete placement map yet; ask again.")
        return json_response({"status": "ready"})


async def _generate(
    service: TextService, plan: Plan, rendering: Rendering, body: CompletionRequest | ChatCompletionRequest, request: Request
) -> Response:
    envelope: dict[str, Any] = {"id": rendering.id_prefix + plan.call.request_id, "object": rendering.object_name}
    envelope |= {"created": int(time.time()), "model": service.model_id}
    deltas = service.run(plan)
    if not body.stream:
        return await while_connected(request.receive, _whole(deltas, plan, rendering, envelope))
    envelope["object"] = rendering.chunk_object_name
    # The status is still open until the first delta: a refusal (queue full, no router) becomes a status, not an event.
    first = await while_connected(request.receive, _first(deltas))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(first, deltas, plan, rendering, envelope, include_usage=include_usage))


async def _whole(deltas: AsyncGenerator[TextDelta, None], plan: Plan, rendering: Rendering, envelope: dict[str, Any]) -> Response:
    answers: list[list[TextDelta]] = [[] for _ in plan.requests]
    async with aclosing(deltas):
        async for delta in deltas:
            answers[delta.index].append(delta)
    joined = [join(answer) for answer in answers]
    choices = [rendering.choice(answer, streamed=False) for answer in joined]
    completion_tokens = sum(answer.usage.completion_tokens for answer in joined if answer.usage is not None)
    return json_response(envelope | {"choices": choices, "usage": rendering.usage(completion_tokens)})


async def _first(deltas: AsyncGenerator[TextDelta, None]) -> TextDelta:
    try:
        return await anext(deltas)
    except BaseException:
        await deltas.aclose()
        raise


async def _events(
    first: TextDelta,
    deltas: AsyncGenerator[TextDelta, None],
    plan: Plan,
    rendering: Rendering,
    envelope: dict[str, Any],
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer; one that fails ends with an error event and without [DONE]."""
    # What is the same in every chunk is written once.
    head = b"data: " + dumps(envelope)[:-1] + b',"choices":['
    tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
    completion_tokens = 0
    async with aclosing(deltas):
        delta: TextDelta | None = first
        try:
            while delta is not None:
                choice = rendering.choice(delta, streamed=True)
                if choice is not None:
                    yield head + dumps(choice) + tail
                if delta.usage is not None:
                    completion_tokens += delta.usage.completion_tokens
                delta = await anext(deltas, None)
        except Exception as error:
            yield event(describe(error, plan.call.request_id).openai_body())
            return
    if include_usage:
        yield event(envelope | {"choices": [], "usage": rendering.usage(completion_tokens)})
    yield b"data: [DONE]\n\n"


def _request_id(request: Request) -> str:
    return str(request.state.request_id)


def _deadline_s(request: Request) -> float | None:
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        return math.nan  # refused with the header's name, like every other number that is none


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
