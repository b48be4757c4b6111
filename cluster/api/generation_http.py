"""OpenAI's generating endpoints over HTTP: completions, chat and responses, whole or as events."""

import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from cluster.api.answers import ChatCompletion, ChatCompletionChunk, Completion, ResponseAnswer, ResponseEvent
from cluster.api.chat import ChatCompletionRequest, chat_call
from cluster.api.chat_rendering import ChatRendering
from cluster.api.connection import EventStream, json_response, while_connected
from cluster.api.errors import describe
from cluster.api.openai import CompletionRequest, completion_call
from cluster.api.openapi import TIMEOUT_HEADER, answers
from cluster.api.rendering import CompletionRendering, Rendering, dumps, event, join
from cluster.api.responses import ResponsesRequest, responses_call
from cluster.api.responses_rendering import ResponseRendering, response_event
from cluster.api.service import Call, Plan, TextDelta, TextService

Deltas = AsyncGenerator[list[TextDelta], None]


def add_generation(app: FastAPI, service: TextService) -> None:
    """POST /v1/completions, /v1/chat/completions and /v1/responses."""

    @app.post("/v1/completions", tags=["inference"], **answers(Completion, streams=Completion))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Goes on from each prompt."""
        plan = await service.plan(_traced(completion_call(body, _request_id(request), deadline_s(request), TIMEOUT_HEADER), request))
        return await _generate(service, plan, CompletionRendering(body, plan, service.tokenizer), body, request)

    @app.post("/v1/chat/completions", tags=["inference"], **answers(ChatCompletion, streams=ChatCompletionChunk))
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation, in the form of the checkpoint's chat template."""
        plan = await service.plan(_traced(chat_call(body, _request_id(request), deadline_s(request), TIMEOUT_HEADER), request))
        return await _generate(service, plan, ChatRendering(body, plan, service.tokenizer), body, request)

    @app.post("/v1/responses", tags=["inference"], **answers(ResponseAnswer, streams=ResponseEvent))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation, in the form of the Responses API; nothing is stored."""
        plan = await service.plan(_traced(responses_call(body, _request_id(request), deadline_s(request), TIMEOUT_HEADER), request))
        rendering = ResponseRendering(body, plan, service.tokenizer, service.model_id, int(time.time()))
        deltas = service.run(plan, is_paced=bool(body.stream))
        if not body.stream:
            return await while_connected(request.receive, _whole_response(deltas, rendering))
        first = await while_connected(request.receive, _first(deltas))
        return EventStream(_response_events(first, deltas, plan, rendering))


def deadline_s(request: Request) -> float | None:
    """What the client allows; NaN, which the service refuses by the header's name, for what is no number."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        return math.nan


async def _generate(
    service: TextService, plan: Plan, rendering: Rendering, body: CompletionRequest | ChatCompletionRequest, request: Request
) -> Response:
    envelope: dict[str, Any] = {"id": rendering.id_prefix + plan.call.request_id, "object": rendering.object_name}
    envelope |= {"created": int(time.time()), "model": service.model_id}
    deltas = service.run(plan, is_paced=bool(body.stream))
    if not body.stream:
        return await while_connected(request.receive, _whole(deltas, plan, rendering, envelope))
    envelope["object"] = rendering.chunk_object_name
    # The status is still open until the first delta: a refusal (queue full, no router) becomes a status, not an event.
    first = await while_connected(request.receive, _first(deltas))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(first, deltas, plan, rendering, envelope, include_usage=include_usage))


async def _whole(deltas: Deltas, plan: Plan, rendering: Rendering, envelope: dict[str, Any]) -> Response:
    answers: list[list[TextDelta]] = [[] for _ in plan.requests]
    async with aclosing(deltas):
        async for batch in deltas:
            for delta in batch:
                answers[delta.index].append(delta)
    joined = [join(answer) for answer in answers]
    choices = [rendering.choice(answer, streamed=False) for answer in joined]
    completion_tokens = sum(answer.usage.completion_tokens for answer in joined if answer.usage is not None)
    return json_response(envelope | {"choices": choices, "usage": rendering.usage(completion_tokens)})


async def _whole_response(deltas: Deltas, rendering: ResponseRendering) -> Response:
    rendering.begin()
    async with aclosing(deltas):
        async for batch in deltas:
            for delta in batch:
                rendering.push(delta, int(time.time()))
    return json_response(rendering.response)


async def _first(deltas: Deltas) -> list[TextDelta]:
    try:
        return await anext(deltas)
    except BaseException:
        await deltas.aclose()
        raise


async def _events(
    first: list[TextDelta], deltas: Deltas, plan: Plan, rendering: Rendering, envelope: dict[str, Any], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer; one that fails ends with an error event and without [DONE]."""
    # What is the same in every chunk is written once.
    head = b"data: " + dumps(envelope)[:-1] + b',"choices":['
    tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
    completion_tokens = 0
    async with aclosing(deltas):
        batch: list[TextDelta] | None = first
        try:
            while batch is not None:
                events: list[bytes] = []
                for delta in batch:
                    choice = rendering.choice(delta, streamed=True)
                    if choice is not None:
                        events += (head, dumps(choice), tail)
                    if delta.usage is not None:
                        completion_tokens += delta.usage.completion_tokens
                if events:
                    yield b"".join(events)
                batch = await anext(deltas, None)
        except Exception as error:
            yield event(describe(error, plan.call.request_id).openai_body())
            return
    if include_usage:
        yield event(envelope | {"choices": [], "usage": rendering.usage(completion_tokens)})
    yield b"data: [DONE]\n\n"


async def _response_events(first: list[TextDelta], deltas: Deltas, plan: Plan, rendering: ResponseRendering) -> AsyncGenerator[bytes, None]:
    """The events of a response; one that fails ends with an error event."""
    yield b"".join(map(response_event, rendering.begin()))
    async with aclosing(deltas):
        batch: list[TextDelta] | None = first
        try:
            while batch is not None:
                events = [entry for delta in batch for entry in rendering.push(delta, int(time.time()))]
                if events:
                    yield b"".join(map(response_event, events))
                batch = await anext(deltas, None)
        except Exception as error:
            yield response_event(rendering.failed(describe(error, plan.call.request_id).openai_body()["error"]))


def _traced(call: Call, request: Request) -> Call:
    return replace(call, trace=request.state.trace)


def _request_id(request: Request) -> str:
    return str(request.state.request_id)
