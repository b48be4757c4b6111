"""A front door over a scripted router, for tests of what stands between clients and routers."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import httpx

from cluster.api.control import ClusterControl
from cluster.api.http import http_app
from cluster.api.service import Limits, TextService
from cluster.coordinator import Coordinator
from cluster.metrics.application_metrics import ApplicationMetrics
from cluster.metrics.exposition import metrics_text
from model.tokenizer import Tokenizer
from router.request import Delta, PositionLogprobs, Request, TokenLogprob

MODEL = "tiny"
HOST = {"node_id": "n", "is_drained": False, "is_leaving": False, "suspected": False, "loading": 0, "expert_bytes": 1024}
HOST |= {"tokens_per_s": 0.0, "busy_share": 0.0, "wait_s": 0.0}
ROUTERS = [{"id": "router-a", "incarnation": 9, "node_id": "n", "map_version": [3, 7], "suspects": [], "kv_use": 0.25}]
VIEW = {
    "placement": {"version": [3, 7], "layers": {"1": {"0": ["host-a"], "1": ["host-a", "host-b"]}}},
    "epoch": 3,
    "hosts": [
        {"id": "host-a", "incarnation": 5, "ready": 2, "desired": 2, "published": 2, "slots": None, "tokens": 12.0, **HOST},
        {"id": "host-b", "incarnation": 6, "ready": 1, "desired": 1, "published": 1, "slots": 4, **HOST, "is_drained": True},
    ],
    "routers": ROUTERS,
    "load": {
        "expert_tokens": {"1": {"0": 11, "1": 22}},
        "tokens_per_s": {"1": {"0": 1.0, "1": 3.0}},
        "hottest": [{"layer": 1, "expert": 1, "tokens_per_s": 3.5, "replicas": 2}],
        "balancedness": 0.875,
        "planned_balancedness": None,
        "short_window_s": 5.0,
        "long_window_s": 60.0,
        "routers": ROUTERS,
    },
    "standalone_experts": [[1, 0]],
    "failure": None,
    "num_experts": 2,
    "num_ready": 2,
    "events": [{"n": 2, "text": "published map 3.7: 2 experts on 2 hosts"}],
    "decisions": [
        {"n": 1, "time_unix_s": 1e9, "kind": "stay", "text": "nothing moves (a look at the balance): balanced", "num_moves": 0},
        {"n": 2, "time_unix_s": 1e9 + 1, "kind": "publish", "text": "published map 3.7: 2 experts on 2 hosts"},
    ],
    "operations": [],
    "scaling": {},
    "state_store": {"name": "memory", "is_available": True, "error": None, "saved_unix_s": 1e9},
}


class StillCoordinator:
    """Shows VIEW, or raises what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def view(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return VIEW


class NearCoordinator:
    """A real Coordinator without Serve between: what CoordinatorReplica does, in the caller's thread."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator

    async def view(self) -> dict[str, Any]:
        return self.coordinator.view()

    async def metrics(self) -> bytes:
        snapshot = ApplicationMetrics("near", self.coordinator.limits.lease_s).snapshot(self.coordinator, time.monotonic())
        return metrics_text(snapshot, 0)

    async def rebalance(self) -> dict[str, Any]:
        return self.coordinator.rebalance().as_dict()

    async def drain(self, host_id: str) -> dict[str, Any]:
        return self.coordinator.drain(host_id).as_dict()

    async def set_scaling(self, bounds: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return self.coordinator.set_scaling(bounds).as_dict()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        return self.coordinator.operation(operation_id).as_dict()


STILL = ClusterControl(StillCoordinator())


Script = Callable[[Request], Iterable[Any]]


class ScriptedRouter:
    """Plays a script for each request: deltas are told, exceptions raised, an asyncio.Event awaited."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.closed: list[str] = []

    async def generate(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        self.requests.append(request)
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    on_delta(step)
                await asyncio.sleep(0)
        finally:
            self.closed.append(request.request_id)


async def each(batches: AsyncIterator[list[Any]]) -> AsyncIterator[Any]:
    """The items, one by one."""
    async for batch in batches:
        for item in batch:
            yield item


def logprobs_of(token_id: int, count: int | None) -> tuple[PositionLogprobs, ...]:
    """Made-up ones: the chosen token second, its successors around it."""
    if count is None:
        return ()
    top = tuple(TokenLogprob(2 + (token_id + i) % 200, -0.5 - i, i + 1) for i in range(count))
    return (PositionLogprobs(TokenLogprob(token_id, -1.25, 2), top),)


def says(token_ids: Iterable[int], finish: str = "stop") -> Script:
    """One token a step, cut at max_tokens, then the finish."""
    token_ids = tuple(token_ids)

    def script(request: Request) -> Iterable[Delta]:
        sampling = request.sampling
        prompt = None
        if sampling.prompt_logprobs is not None:
            prompt = (None, *(logprobs_of(token, sampling.prompt_logprobs)[0] for token in request.prompt_token_ids[1:]))
        wanted = token_ids[: sampling.max_tokens]
        for position, token in enumerate(wanted):
            last = position == len(wanted) - 1
            reason = ("length" if len(token_ids) >= sampling.max_tokens else finish) if last else None
            yield Delta(request.request_id, (token,), logprobs_of(token, sampling.logprobs), prompt if position == 0 else None, reason)

    return script


def make_service(tokenizer: Tokenizer | None, script: Script, **options: Any) -> tuple[TextService, ScriptedRouter]:
    router = ScriptedRouter(script)
    options = {"vocab_size": 400, "max_model_len": 64, "end_token_ids": (1,), **options}
    if "limits" not in options:
        options["limits"] = Limits(max_sequences=16)
    return TextService(MODEL, router, tokenizer, **options), router


def http_client(service: TextService, *, ready: bool = True, control: ClusterControl = STILL) -> httpx.AsyncClient:
    app = http_app(service, control, lambda: ready)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


class FakeContext:
    """What Serve hands to a gRPC method."""

    def __init__(self, metadata: Iterable[tuple[str, str]] = ()) -> None:
        self.metadata = list(metadata)
        self.code: Any = None
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing = dict(trailing_metadata)
