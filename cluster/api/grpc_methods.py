"""The gRPC services of shoal.v1, as plain methods: Ray Serve's proxy speaks the wire protocol and calls them by name."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from cluster.api.control import ClusterControl
from cluster.api.grpc_batch import Batch
from cluster.api.grpc_call import Context, GrpcCall
from cluster.api.grpc_chat import ChatDeltas, chat_call
from cluster.api.grpc_messages import (
    Asked,
    bounds_values,
    delta_message,
    generate_call,
    load_message,
    operation_message,
    placement_message,
)
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2
from cluster.api.scaling_bounds import read_bounds
from cluster.api.service import TextService
from cluster.guard.guard import Guard
from cluster.guard.keys import Scope
from router.errors import DeadlineExceeded, InvalidRequest

T = TypeVar("T")
Batches = AsyncGenerator[list[Any], None]  # a stream's messages, as many at a time as are ready


class GrpcMethods:
    """Every method ends by a status, never by an exception: Serve would put its stack trace into the status.

    Without a guard everybody may do everything.
    """

    def __init__(self, service: TextService, control: ClusterControl, guard: Guard | None = None) -> None:
        self._service = service
        self._control = control
        self._guard = guard

    def generate(self, request: Any, context: Context) -> Batches:
        """GenerateRequest -> Deltas."""
        call = GrpcCall(context)
        return self._stream(call, lambda: self._generated(request, call.asked, is_paced=True), inference_pb2.Delta)

    def chat(self, request: Any, context: Context) -> Batches:
        """ChatRequest -> Deltas."""
        call = GrpcCall(context)
        return self._stream(call, lambda: self._chatted(request, call.asked, is_paced=True), inference_pb2.Delta)

    def generate_batch(self, requests: AsyncIterator[Any], context: Context) -> Batches:
        """BatchRequests -> BatchResponses."""
        call = GrpcCall(context)

        def answer(request: Any, request_id: str) -> Batches:
            kind = request.WhichOneof("request")
            if kind is None:
                raise InvalidRequest("request: must be generate, chat or cancel.", field="request")
            asked = replace(call.asked, request_id=request_id)
            if request.HasField("timeout_s"):
                asked = replace(asked, deadline_s=request.timeout_s, deadline_name="timeout_s")
            return self._generated(request.generate, asked) if kind == "generate" else self._chatted(request.chat, asked)

        return self._stream(
            call, lambda: self._service.pace.keep(Batch(answer, call.request_id).run(requests)), inference_pb2.BatchResponse
        )

    async def list_models(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """ListModelsRequest -> ListModelsResponse."""

        async def answer() -> Any:
            service = self._service
            model = inference_pb2.Model(id=service.model_id, max_model_len=service.max_model_len, vocab_size=service.vocab_size)
            model.has_chat_template = service.tokenizer is not None and service.tokenizer.has_chat_template
            return inference_pb2.ListModelsResponse(models=[model])

        return await self._unary(answer, context, inference_pb2.ListModelsResponse, "any")

    async def tokenize(self, request: Any, context: Context) -> Any:
        """TokenizeRequest -> TokenizeResponse."""

        async def answer() -> Any:
            self._service.check_model(request.model or None)
            add = request.add_special_tokens if request.HasField("add_special_tokens") else True
            return inference_pb2.TokenizeResponse(token_ids=await self._service.encode(request.text, add, "text"))

        return await self._unary(answer, context, inference_pb2.TokenizeResponse)

    async def detokenize(self, request: Any, context: Context) -> Any:
        """DetokenizeRequest -> DetokenizeResponse."""

        async def answer() -> Any:
            self._service.check_model(request.model or None)
            self._service.check_token_ids(request.token_ids, "token_ids")
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            return inference_pb2.DetokenizeResponse(text=self._service.decode(request.token_ids, skip))

        return await self._unary(answer, context, inference_pb2.DetokenizeResponse)

    async def get_placement(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """GetPlacementRequest -> Placement."""

        async def answer() -> Any:
            return placement_message(await self._control.view())

        return await self._unary(answer, context, cluster_pb2.Placement, "any")

    async def get_load(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """GetLoadRequest -> Load."""

        async def answer() -> Any:
            return load_message(await self._control.view())

        return await self._unary(answer, context, cluster_pb2.Load, "any")

    def watch_load(self, request: Any, context: Context) -> Batches:
        """WatchLoadRequest -> Loads, for as long as a stream may last."""
        call = GrpcCall(context)

        async def loads() -> Batches:
            interval_s = request.interval_s if request.HasField("interval_s") else 1.0
            if not 0.1 <= interval_s <= 60.0:
                raise InvalidRequest("interval_s: must be 0.1 to 60.", field="interval_s")
            lifetime_s, clock = self._service.limits.max_deadline_s, asyncio.get_running_loop().time
            ends = clock() + lifetime_s
            while clock() < ends:
                yield [load_message(await self._control.view())]
                await asyncio.sleep(interval_s)
                call.check()
            raise DeadlineExceeded(f"The watch has lasted {lifetime_s:g} s, as long as a stream may; begin another.")

        return self._stream(call, loads, cluster_pb2.Load, "any")

    async def rebalance(self, request: Any, context: Context) -> Any:  # noqa: ARG002 - the request is empty
        """RebalanceRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.rebalance())

        return await self._unary(answer, context, cluster_pb2.Operation, "operator")

    async def drain(self, request: Any, context: Context) -> Any:
        """DrainRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.drain(request.host_id))

        return await self._unary(answer, context, cluster_pb2.Operation, "operator")

    async def set_scaling(self, request: Any, context: Context) -> Any:
        """SetScalingRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.set_scaling(read_bounds(bounds_values(request))))

        return await self._unary(answer, context, cluster_pb2.Operation, "operator")

    async def get_operation(self, request: Any, context: Context) -> Any:
        """GetOperationRequest -> Operation."""

        async def answer() -> Any:
            return operation_message(await self._control.operation(request.id))

        return await self._unary(answer, context, cluster_pb2.Operation, "any")

    async def _generated(self, request: Any, asked: Asked, *, is_paced: bool = False) -> Batches:
        """Deltas of a GenerateRequest. Raises what the table in `errors` has a row for."""
        call = generate_call(request, asked)
        async with aclosing(self._service.run(await self._service.plan(call), is_paced=is_paced)) as batches:
            async for deltas in batches:
                messages = [
                    delta_message(delta, call.request_id, self._service.tokenizer)
                    for delta in deltas
                    if delta.text or delta.tokens or delta.finish is not None or delta.prompt_logprobs is not None
                ]
                if messages:
                    yield messages

    async def _chatted(self, request: Any, asked: Asked, *, is_paced: bool = False) -> Batches:
        """Deltas of a ChatRequest. Raises what the table in `errors` has a row for."""
        plan = await self._service.plan(chat_call(request, asked))
        answers = ChatDeltas(request, plan, self._service.tokenizer)
        async with aclosing(self._service.run(plan, is_paced=is_paced)) as batches:
            async for deltas in batches:
                messages = [message for message in map(answers.message, deltas) if message is not None]
                if messages:
                    yield messages

    async def _stream(
        self, call: GrpcCall, messages: Callable[[], Batches], empty: Callable[[], Any], scope: Scope = "inference"
    ) -> Batches:
        try:
            await call.admit(self._guard, scope)
            async with aclosing(messages()) as batches:
                async for batch in batches:
                    yield batch
        except Exception as error:
            call.fail(error)
            # Serve takes code and metadata over from the context with each message, so one has to follow.
            yield [empty()]

    async def _unary(self, answer: Callable[[], Awaitable[T]], context: Context, empty: Callable[[], T], scope: Scope = "inference") -> T:
        call = GrpcCall(context)
        try:
            await call.admit(self._guard, scope)
            return await answer()
        except Exception as error:
            call.fail(error)
            return empty()
