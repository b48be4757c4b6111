"""How a service asks Shoal over gRPC: one deadline for everything, another try where Shoal says UNAVAILABLE, a key from a Secret.

`shoal.v1` is made from the .proto files (see Dockerfile); nothing of Shoal itself is installed.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import inference_pb2_grpc as rpc

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


@dataclass(frozen=True)
class Settings:
    """`key_file` is read for every call: a Secret that changes is mounted anew without a restart. None where no key is asked for."""

    address: str
    key_file: Path | None
    application: str | None = None
    deadline_s: float = 60.0


@dataclass(frozen=True)
class Answer:
    """`attempts`: how often Shoal was asked for it."""

    text: str
    completion_tokens: int
    attempts: int


def pause_s(attempt: int, retry_after_s: float | None, draw: Callable[[], float] = random.random) -> float:
    """Before another try, after `attempt` of them: what the server asks for, or else doubling, and never all clients at once."""
    longest_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
    return max(retry_after_s or 0.0, longest_s * (0.5 + draw() / 2))


class ShoalClient:
    """One channel for all calls; close it at the end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channel = grpc.aio.insecure_channel(settings.address, options=[("grpc.max_reconnect_backoff_ms", 2000)])
        self._stub = rpc.InferenceStub(self._channel)

    async def close(self) -> None:
        """Open calls are cancelled, which frees their memory at once."""
        await self._channel.close()

    async def chat(self, request: pb.ChatRequest, request_id: str, deadline_s: float | None = None) -> Answer:
        """The whole answer, or grpc.aio.AioRpcError within the deadline, which all tries share. Only UNAVAILABLE is tried again.

        An answer that broke off is asked for anew, from its beginning: nothing of it has been passed on.
        """
        until = time.monotonic() + (deadline_s or self._settings.deadline_s)
        attempt = 1
        while True:
            try:
                return await self._ask(request, request_id, until - time.monotonic(), attempt)
            except grpc.aio.AioRpcError as error:
                pause = pause_s(attempt, retry_after_s(error))
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() + pause >= until:
                    raise
            await asyncio.sleep(pause)
            attempt += 1

    async def _ask(self, request: pb.ChatRequest, request_id: str, timeout_s: float, attempt: int) -> Answer:
        texts, completion_tokens = [], 0
        async for delta in self._stub.Chat(request, timeout=timeout_s, metadata=self._metadata(request_id)):
            texts.append(delta.text)
            completion_tokens = delta.usage.completion_tokens or completion_tokens
        return Answer("".join(texts), completion_tokens, attempt)

    def _metadata(self, request_id: str) -> list[tuple[str, str]]:
        metadata = [("x-request-id", request_id)]
        if self._settings.application is not None:
            metadata.append(("application", self._settings.application))
        if self._settings.key_file is not None:
            metadata.append(("authorization", f"Bearer {self._settings.key_file.read_text(encoding='utf-8').strip()}"))
        return metadata


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """Seconds after which the server says that another try may help."""
    for name, value in error.trailing_metadata() or ():
        if name == "retry-after":
            return float(value)
    return None
