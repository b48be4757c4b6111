"""One JSON line for every call that ends: ids, lengths and seconds, never a word of what was said."""

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.metrics.watch import CallWatch

MAX_IDS = 16


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


class RequestLog:
    """`write_line` takes one line without its end; by default it goes where the process's log goes."""

    def __init__(self, model: str, write_line: Callable[[str], None] = _to_stderr, wall_clock: Callable[[], float] = time.time) -> None:
        self._model = model
        self._write_line = write_line
        self._wall_clock = wall_clock

    def write(self, call: "CallWatch", kind: str | None, now: float) -> None:
        """The line of a call that ended at `now` (its plan's clock), by the error `kind` if there was one.

        `router_request_ids` are those by which routers' logs know its answers, the first MAX_IDS of them.
        """
        plan = call.plan
        first = min(call.first_token_at.values(), default=None)
        line = {
            "event": "request",
            "time_unix_s": round(self._wall_clock(), 3),
            "request_id": plan.call.request_id,
            "router_request_ids": [request.request_id for request in plan.requests[:MAX_IDS]],
            "trace_id": call.trace_id,
            "model": self._model,
            "num_prompts": len(plan.prompts),
            "num_answers": len(plan.requests),
            "prompt_tokens": sum(map(len, plan.prompts)),
            "completion_tokens": sum(call.num_tokens),
            "finish_reasons": sorted({str(finish) for finish in call.finishes}),
            "error": kind,
            "first_token_s": None if first is None else round(first - plan.arrived, 6),
            "total_s": round(now - plan.arrived, 6),
        }
        self._write_line(json.dumps(line, separators=(",", ":")))
