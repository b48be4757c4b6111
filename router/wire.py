"""Requests and deltas as msgpack-able lists and dicts: what the channel between gateway and router carries."""

from dataclasses import asdict
from typing import Any

from router.request import Delta, Failure, PositionLogprobs, Request, TokenLogprob

Wire = dict[str, Any]


def submit(request: Request) -> Wire:
    """The message that hands `request` to a router."""
    return {"submit": request.model_dump(mode="python")}


def cancel(request_id: str) -> Wire:
    """The message by which a gateway says that a client went away."""
    return {"cancel": request_id}


def deltas_to_wire(deltas: list[Delta]) -> Wire:
    """One message for everything that one step says to one gateway."""
    return {"deltas": [_delta_to_wire(delta) for delta in deltas]}


def deltas_from_wire(message: Wire) -> list[Delta]:
    """The deltas of a router's message."""
    return [_delta_from_wire(wire) for wire in message["deltas"]]


def _delta_to_wire(delta: Delta) -> list[Any]:
    prompt = delta.prompt_logprobs
    return [
        delta.request_id,
        delta.token_ids,
        [_position_to_wire(position) for position in delta.logprobs],
        None if prompt is None else [None if position is None else _position_to_wire(position) for position in prompt],
        delta.finish,
        None if delta.failure is None else asdict(delta.failure),
    ]


def _delta_from_wire(wire: list[Any]) -> Delta:
    request_id, token_ids, logprobs, prompt, finish, failure = wire
    return Delta(
        request_id,
        tuple(token_ids),
        tuple(_position_from_wire(position) for position in logprobs),
        None if prompt is None else tuple(None if position is None else _position_from_wire(position) for position in prompt),
        finish,
        None if failure is None else Failure(**failure),
    )


def _position_to_wire(position: PositionLogprobs) -> list[tuple[int, float, int]]:
    return [(token.token_id, token.logprob, token.rank) for token in (position.chosen, *position.top)]


def _position_from_wire(wire: list[list[Any]]) -> PositionLogprobs:
    chosen, *top = (TokenLogprob(*token) for token in wire)
    return PositionLogprobs(chosen, tuple(top))
