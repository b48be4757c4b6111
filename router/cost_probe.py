"""What a host's answers cost it: alpha for each expert that a frame activates, beta for each token of one. Measured, not guessed."""

import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from model.logical_expert import LogicalExpert
from router.placement_map import MapVersion
from router.transport.channel import Incoming
from router.transport.frames import ExpertsAnswer, ExpertsRequest, FrameKind

NUM_EXPERTS = 8  # in one call: enough to be out of the caches, few enough for a large model's host to be done soon
NUM_TOKENS = 8  # for each of them; a decode step seldom has more
ANSWER_TIMEOUT_S = 10.0


class HostSpeed(NamedTuple):
    """Seconds for each activated expert, and for each token of one."""

    alpha_s: float
    beta_s: float


def measure_speed(
    on_frame: Callable[[Incoming], None],
    held: frozenset[LogicalExpert],
    hidden_size: int,
    limit_s: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> HostSpeed | None:
    """Asks a host for its own experts as a router would, before routers do: by frames, so that the compute thread answers.

    The best of as many calls as fit into `limit_s`, two of each size at least: whatever else runs makes a call slower, never
    faster. None without experts, or where they do not answer.
    """
    if not held:
        return None
    layer = Counter(expert.layer for expert in held).most_common(1)[0][0]
    experts = sorted(expert.expert for expert in held if expert.layer == layer)[:NUM_EXPERTS]
    requests = [_request(layer, experts, num_tokens, hidden_size) for num_tokens in (1, NUM_TOKENS)]
    best_s = [float("inf"), float("inf")]
    until = clock() + limit_s
    num_rounds = 0
    while num_rounds < 2 or clock() < until:
        num_rounds += 1
        for index, request in enumerate(requests):
            started = clock()
            if not _is_answered(on_frame, request):
                return None
            best_s[index] = min(best_s[index], clock() - started)
    few_s, many_s = (seconds / len(experts) for seconds in best_s)
    beta_s = max(many_s - few_s, 0.0) / (NUM_TOKENS - 1)
    return HostSpeed(max(few_s - beta_s, 0.0), beta_s)


def _request(layer: int, experts: list[int], num_tokens: int, hidden_size: int) -> ExpertsRequest:
    expert_ids = torch.tensor(experts, dtype=torch.int16).repeat(num_tokens, 1)
    hidden = torch.linspace(-1, 1, num_tokens * hidden_size).view(num_tokens, hidden_size)
    return ExpertsRequest(layer, MapVersion(0, 0), hidden, expert_ids, torch.full(expert_ids.shape, 1 / len(experts)))


def _is_answered(on_frame: Callable[[Incoming], None], request: ExpertsRequest) -> bool:
    answers: queue.SimpleQueue[ExpertsAnswer] = queue.SimpleQueue()
    on_frame(Incoming(0, 1, request, answers.put))
    try:
        return answers.get(timeout=ANSWER_TIMEOUT_S).kind == FrameKind.PARTIAL
    except queue.Empty:
        return False
