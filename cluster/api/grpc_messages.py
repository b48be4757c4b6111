"""Between our values and the messages of shoal.v1."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.api.cluster_parts import NUM_DECISIONS
from cluster.api.errors import Problem
from cluster.api.grpc_status import retry_after_s, text_of
from cluster.api.proto.shoal.v1 import cluster_pb2, inference_pb2
from cluster.api.service import Call, TextDelta
from cluster.api.trace_context import TraceContext
from model.tokenizer import Tokenizer
from router.request import PositionLogprobs, SamplingParams, TokenLogprob

SAMPLING_NAMES = {name: f"sampling.{name}" for name in SamplingParams.model_fields}
CONSTRAINTS = tuple(field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.oneofs_by_name["constraint"].fields)

FINISH = {"stop": inference_pb2.FINISH_REASON_STOP, "length": inference_pb2.FINISH_REASON_LENGTH}
ROUTER_FIELDS = ("id", "incarnation", "node_id")
DECISION_FIELDS = ("n", "time_unix_s", "kind", "text")
HOST_FIELDS = (*ROUTER_FIELDS, "ready", "desired", "published", "slots")


@dataclass(frozen=True)
class Asked:
    """What a request's call says beside it. `deadline_name` is where the client wrote the deadline."""

    request_id: str
    deadline_s: float | None
    deadline_name: str
    trace: TraceContext | None = None


def sampling_values(message: Any) -> dict[str, Any]:
    """The parameters that were set, by SamplingParams' names."""
    values = {descriptor.name: value for descriptor, value in message.ListFields()}
    # ListFields has every optional field that was set, to its default too, and no empty list or map.
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    if "stop_token_ids" in values:
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    kind = message.WhichOneof("constraint")
    if kind is not None:
        given = values.pop(kind)
        texts = {"json_object": "", "choice": json.dumps(list(given.choices)) if kind == "choice" else ""}
        values["constraint"] = {"kind": kind, "value": texts.get(kind, given)}
    return values


def generate_call(request: Any, asked: Asked) -> Call:
    """What a GenerateRequest asks for."""
    form = request.WhichOneof("prompt")
    prompts: tuple[str | tuple[int, ...], ...] = () if form is None else (request.text,)
    if form == "token_ids":
        prompts = (tuple(request.token_ids.ids),)
    names = {"prompt": "token_ids.ids" if form == "token_ids" else "text"}
    return call_of(request, asked, names, prompts=prompts)


def call_of(request: Any, asked: Asked, names: Mapping[str, str], **fields: Any) -> Call:
    """What a GenerateRequest and a ChatRequest share. `fields` are the rest of Call's, over what they share."""
    constraint = request.sampling.WhichOneof("constraint")
    shared = {
        "sampling": sampling_values(request.sampling),
        "names": {**SAMPLING_NAMES, "constraint": f"sampling.{constraint}", "deadline_s": asked.deadline_name, **names},
        "stop": tuple(request.stop),
        "n": request.n if request.HasField("n") else 1,
    }
    return Call(asked.request_id, request.model or None, deadline_s=asked.deadline_s, trace=asked.trace, **{**shared, **fields})


def error_message(problem: Problem) -> Any:
    """A problem as one request of a batch is told it."""
    message = inference_pb2.RequestError(
        code=problem.status.grpc.value[0], message=text_of(problem), kind=problem.kind, field=problem.field or ""
    )
    delay_s = retry_after_s(problem)
    if delay_s is not None:
        message.retry_after_s = delay_s
    return message


def delta_message(delta: TextDelta, request_id: str, tokenizer: Tokenizer | None) -> Any:
    """A TextDelta as it goes over the wire."""
    message = inference_pb2.Delta(
        request_id=request_id, index=delta.index, text=delta.text, token_ids=[token.token_id for token in delta.tokens]
    )
    for token in delta.tokens:
        if token.logprobs is not None:
            _add_position(message.logprobs.add(), token.logprobs, tokenizer)
    for position in delta.prompt_logprobs or ():
        entry = message.prompt_logprobs.add()
        if position is not None:
            _add_position(entry, position, tokenizer)
    if delta.finish is not None:
        message.finish_reason = FINISH[delta.finish]
    if delta.usage is not None and delta.timing is not None:
        message.usage.prompt_tokens = delta.usage.prompt_tokens
        message.usage.completion_tokens = delta.usage.completion_tokens
        message.timing.first_token_s = delta.timing.first_token_s
        message.timing.total_s = delta.timing.total_s
    return message


def placement_message(view: Mapping[str, Any]) -> Any:
    """The Coordinator's view as a Placement."""
    placement = view["placement"]
    message = cluster_pb2.Placement(version=_version(placement["version"]))
    for layer, experts in placement["layers"].items():
        for expert, hosts in experts.items():
            message.experts.add(layer=int(layer), expert=int(expert), hosts=hosts)
    return message


def load_message(view: Mapping[str, Any]) -> Any:
    """The Coordinator's view as a Load."""
    message = cluster_pb2.Load()
    for host in view["hosts"]:
        message.hosts.add(**{name: host[name] for name in HOST_FIELDS}, stats=_stats(host))
    for router in view["routers"]:
        version = _version(router["map_version"])
        message.routers.add(**{name: router[name] for name in ROUTER_FIELDS}, map_version=version, stats=_stats(router))
    for layer, experts in view["load"]["expert_tokens"].items():
        for expert, tokens in experts.items():
            message.experts.add(layer=int(layer), expert=int(expert), tokens=int(tokens))
    for name in ("balancedness", "planned_balancedness"):
        if view["load"][name] is not None:
            setattr(message, name, view["load"][name])
    for line in view["decisions"][-NUM_DECISIONS:]:
        message.decisions.add(**{name: line[name] for name in DECISION_FIELDS})
    return message


def operation_message(operation: Mapping[str, Any]) -> Any:
    """An operation's plain values as an Operation."""
    return cluster_pb2.Operation(**{**operation, "state": f"OPERATION_STATE_{operation['state'].upper()}"})


def bounds_values(message: Any) -> dict[str, dict[str, int]]:
    """A SetScalingRequest's roles that were set, each with the bounds that were."""
    return {role.name: {bound.name: value for bound, value in bounds.ListFields()} for role, bounds in message.ListFields()}


def _stats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if name not in HOST_FIELDS and isinstance(value, int | float)}


def _version(version: Iterable[int] | None) -> Any:
    if version is None:
        return None
    epoch, n = version
    return cluster_pb2.MapVersion(epoch=epoch, n=n)


def _add_position(message: Any, position: PositionLogprobs, tokenizer: Tokenizer | None) -> None:
    message.chosen.CopyFrom(_logprob(position.chosen, tokenizer))
    message.top.extend(_logprob(token, tokenizer) for token in position.top)


def _logprob(token: TokenLogprob, tokenizer: Tokenizer | None) -> Any:
    raw = b"" if tokenizer is None else tokenizer.token_bytes(token.token_id)
    return inference_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank, bytes=raw)
