"""The gRPC services of shoal.v1, as plain methods: Ray Serve's proxy speaks the wire protocol and calls them by name."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc

from cluster.api.connection import REQUEST_ID, request_id_of
from cluster.api.control import ClusterControl
from cluster.api.errors import describe
from cluster.api.grpc_messages import bounds_values, delta_message, load_message, operation_message, placement_message, sampling_values
from cluster.api.http import TIMEOUT_HEADER
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2
from cluster.api.scaling_bounds import read_bounds
from cluster.api.service import Call, TextService
from router.errors import InvalidRequest
from router.request import SamplingParams

T = TypeVar("T")
Metadata = list[tuple[str, str]]
ROLES = ("system", "developer", "user", "assistant")
SAMPLING_NAMES = {name: f"sampling.{name}" for name in SamplingParams.model_fields}


class Context(Protocol):
    """What is used of Serve's RayServegRPCContext, which is also in grpc.aio's own context."""

    def invocation_metadata(self) -> Iterable[tuple[str, str]]:
        """What the client sent beside the request."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """The call's status."""
        ...

    def set_details(self, details: str) -> None:
        """The status's sentence."""
        ...

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """What goes out beside the status; the last call counts."""
        ...


class GrpcMethods:
    """Every method ends by a status, never by an exception: Serve would put its stack trace into the status."""

    def __init__(self, service: TextService, control: ClusterControl) -> None:
        self._service = service
        self._control = control

    def generate(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """GenerateRequest -> Deltas."""
        prompt = {"text": "text", "token_ids": "token_ids.ids"}.get(request.WhichOneof("prompt") or "text", "text")
        prompts = (tuple(request.token_ids.ids),) if prompt == "token_ids.ids" else (request.text,)
        return self._stream(request, context, {"prompt": prompt}, prompts=prompts if request.WhichOneof("prompt") else ())

    def chat(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """ChatRequest -> Deltas."""
        messages = tuple({"role": message.role, "content": message.content} for message in request.messages)
        return self._stream(request, context, {}, messages=messages)

    async def list_models(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """ListModelsRequest -> ListModelsResponse."""

        async def answer() -> Any:
            service = self._service
            model = inference_pb2.Model(id=service.model_id, max_model_len=service.max_model_len, vocab_size=service.vocab_size)
            model.has_chat_template = service.tokenizer is not None and service.tokenizer.has_chat_template
            return inference_pb2.ListModelsResponse(models=[model])

        return await _unary(answer(), context, inference_pb2.ListModelsResponse)

    async def tokenize(self, request: Any, context: Context) -> Any:
        """TokenizeRequest -> TokenizeResponse."""

        async def answer() -> Any:
            self._service.check_model(request.model or None)
            add = request.add_special_tokens if request.HasField("add_special_tokens") else True
            return inference_pb2.TokenizeResponse(token_ids=await self._service.encode(request.text, add, "text"))

        return await _unary(answer(), context, inference_pb2.TokenizeResponse)

    async def detokenize(self, request: Any, context: Context) -> Any:
        """DetokenizeRequest -> DetokenizeResponse."""

        async def answer() -> Any:
            self._service.check_model(request.model or None)
            self._service.check_token_ids(request.token_ids, "token_ids")
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            return inference_pb2.DetokenizeResponse(text=self._service.decode(request.token_ids, skip))

        return await _unary(answer(), context, inference_pb2.DetokenizeResponse)

    async def get_placement(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """GetPlacementRequest -> Placement."""

        async def answer() -> Any:
            return placement_message(await self._control.view())

        return await _unary(answer(), context, cluster_pb2.Placement)

    async def get_load(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """GetLoadRequest -> Load."""

        async def answer() -> Any:
            return load_message(await self._control.view())

        return await _unary(answer(), context, cluster_pb2.Load)

    async def watch_load(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """WatchLoadRequest -> Loads, without end."""
        request_id, _ = _open(context)
        try:
            interval_s = request.interval_s if request.HasField("interval_s") else 1.0
            if not 0.1 <= interval_s <= 60.0:
                raise InvalidRequest("interval_s: must be 0.1 to 60.", field="interval_s")
            while True:
                yield load_message(await self._control.view())
                await asyncio.sleep(interval_s)
        except Exception as error:
            _fail(context, error, request_id)
            yield cluster_pb2.Load()

    async def rebalance(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """RebalanceRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.rebalance())

        return await _unary(answer(), context, cluster_pb2.Operation)

    async def drain(self, request: Any, context: Context) -> Any:
        """DrainRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.drain(request.host_id))

        return await _unary(answer(), context, cluster_pb2.Operation)

    async def set_scaling(self, request: Any, context: Context) -> Any:
        """SetScalingRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.set_scaling(read_bounds(bounds_values(request))))

        return await _unary(answer(), context, cluster_pb2.Operation)

    async def get_operation(self, request: Any, context: Context) -> Any:
        """GetOperationRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.operation(request.id))

        return await _unary(answer(), context, cluster_pb2.Operation)

    async def _stream(
        self,
        request: Any,
        context: Context,
        names: Mapping[str, str],
        *,
        prompts: tuple[str | tuple[int, ...], ...] = (),
        messages: tuple[Mapping[str, str], ...] | None = None,
    ) -> AsyncGenerator[Any, None]:
        request_id, deadline_s = _open(context)
        try:
            for index, message in enumerate(messages or ()):
                if message["role"] not in ROLES:
                    name = f"messages[{index}].role"
                    raise InvalidRequest(f"{name}: must be one of {', '.join(ROLES)}.", field=name)
            call = Call(
                request_id,
                request.model or None,
                prompts,
                messages,
                sampling_values(request.sampling),
                tuple(request.stop),
                request.n if request.HasField("n") else 1,
                deadline_s,
                {**SAMPLING_NAMES, "deadline_s": TIMEOUT_HEADER.lower(), **names},
            )
            async with aclosing(self._service.run(await self._service.plan(call))) as deltas:
                async for delta in deltas:
                    if delta.text or delta.tokens or delta.finish is not None or delta.prompt_logprobs is not None:
                        yield delta_message(delta, request_id, self._service.tokenizer)
        except Exception as error:
            _fail(context, error, request_id)
            # Serve takes code and metadata over from the context with each message, so one has to follow.
            yield inference_pb2.Delta()


def _open(context: Context) -> tuple[str, float | None]:
    """The call's id, echoed, and the deadline it asks for in its metadata."""
    metadata = dict(context.invocation_metadata())
    request_id = request_id_of(metadata.get(REQUEST_ID))
    context.set_trailing_metadata([(REQUEST_ID, request_id)])
    given = metadata.get(TIMEOUT_HEADER.lower())
    try:
        return request_id, None if given is None else float(given)
    except ValueError:
        return request_id, float("nan")  # refused with the metadata's name


def _fail(context: Context, error: Exception, request_id: str) -> None:
    problem = describe(error, request_id)
    context.set_code(problem.status.grpc)
    context.set_details(problem.message)
    trailing = [(REQUEST_ID, request_id), ("shoal-error-kind", problem.kind)]
    if problem.field is not None:
        trailing.append(("shoal-error-field", problem.field))
    context.set_trailing_metadata(trailing)


async def _unary(answer: Awaitable[T], context: Context, empty: type[T]) -> T:
    request_id, _ = _open(context)
    try:
        return await answer
    except Exception as error:
        _fail(context, error, request_id)
        return empty()
