"""A microservice that uses Shoal: `POST /titles {"text": ...}` answers with a title for the text.

Environment: SHOAL_ADDRESS (host:port), SHOAL_API_KEY_FILE, SHOAL_APPLICATION (where one port has several), DEADLINE_S, PORT.
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from shoal.v1 import inference_pb2 as pb
from shoal_client import Settings, ShoalClient

INSTRUCTION = "Answer with a title of at most eight words for the user's text, and nothing else."
MAX_TOKENS = 32
# What a caller is told of the statuses that Shoal gives; anything else is this service's fault.
HTTP_STATUS = {
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
}


class Text(BaseModel):
    """What is to get a title."""

    text: str = Field(min_length=1, max_length=20_000)


class Title(BaseModel):
    """The title, what it cost, and how often Shoal had to be asked."""

    title: str
    tokens: int
    attempts: int


def read_settings(environment: dict[str, str]) -> Settings:
    """KeyError without an address."""
    key_file = environment.get("SHOAL_API_KEY_FILE")
    return Settings(
        address=environment["SHOAL_ADDRESS"],
        key_file=Path(key_file) if key_file else None,
        application=environment.get("SHOAL_APPLICATION"),
        deadline_s=float(environment.get("DEADLINE_S", "60")),
    )


def build(settings: Settings) -> FastAPI:
    """The service; its channel opens with it and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.shoal = ShoalClient(settings)
        yield
        await app.state.shoal.close()

    app = FastAPI(title="Titles", lifespan=lifespan)

    @app.exception_handler(grpc.aio.AioRpcError)
    async def told(_: Request, error: grpc.aio.AioRpcError) -> Response:
        return JSONResponse({"error": error.details()}, HTTP_STATUS.get(error.code(), 500))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Of this service alone: were it Shoal's too, an upgrade of Shoal would restart every service."""
        return {"status": "ok"}

    @app.post("/titles")
    async def titles(text: Text, request: Request) -> Title:
        messages = [pb.ChatMessage(role="system", content=INSTRUCTION), pb.ChatMessage(role="user", content=text.text)]
        asked = pb.ChatRequest(messages=messages, sampling=pb.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
        answer = await app.state.shoal.chat(asked, request.headers.get("x-request-id") or f"titles-{uuid.uuid4().hex}")
        return Title(title=answer.text.strip(), tokens=answer.completion_tokens, attempts=answer.attempts)

    return app


if __name__ == "__main__":
    uvicorn.run(build(read_settings(dict(os.environ))), host="0.0.0.0", port=int(os.environ.get("PORT", "8080")), log_level="warning")
