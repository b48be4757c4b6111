"""Drives forward passes to their logits: gates and sends what they dispatch, waits for what they combine."""

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Combine, Dispatch, ForwardPass
from model.causal_lm import CausalLM
from model.experts import Experts
from router.gating import route


class Logits(NamedTuple):
    """Of all passes, in their order, [R, V] float32; and for how many seconds nothing was done but to wait for experts."""

    logits: Tensor
    waited_s: float


def run_forwards(forwards: Sequence[ForwardPass], model: CausalLM, experts: Experts) -> Logits:
    """Runs the passes in turns: while the experts of one are away, the dense part of the next is computed.

    They are waited for in the order in which they were sent, which is that in which hosts answer. Whatever this raises, nothing that
    was dispatched stays open.
    """
    under_way: deque[tuple[int, Combine]] = deque()
    handles: list[object] = []
    logits: list[Tensor | None] = [None] * len(forwards)
    waited_s = 0.0

    def advance(number: int, answer: Tensor | None) -> None:
        """Until the pass waits for its experts, or has its logits."""
        try:
            message = next(forwards[number]) if answer is None else forwards[number].send(answer)
            while isinstance(message, Dispatch):
                routing = route(message.hidden, message.token_ids, model.gate(message.layer))
                handles.append(experts.dispatch(message.layer, message.hidden, routing))
                message = forwards[number].send(handles[-1])
            under_way.append((number, message))
        except StopIteration as finished:
            logits[number] = finished.value

    try:
        for number in range(len(forwards)):
            advance(number, None)
        while under_way:
            number, message = under_way.popleft()
            # By identity: a handle may be a tensor, whose == is not a truth value.
            handles = [handle for handle in handles if handle is not message.handle]
            started = time.perf_counter()
            routed = experts.combine(message.handle)
            waited_s += time.perf_counter() - started
            advance(number, routed)
        found = [each for each in logits if each is not None]
        return Logits(found[0] if len(found) == 1 else torch.cat(found), waited_s)
    finally:
        for forward in forwards:
            forward.close()
        for handle in handles:
            experts.abandon(handle)
