"""Watches the calls of one gateway from arrival to end: counts them, and where configured traces them and writes a line for each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from cluster.metrics.request_log import RequestLog
from cluster.metrics.request_metrics import RequestMetrics
from router.request import FinishReason, Request

if TYPE_CHECKING:
    from cluster.api.service import Plan


class CallSpan(Protocol):
    """The trace of one call; see cluster.metrics.call_tracer."""

    trace_id: str

    def requests(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests with this span as the parent of their routers' spans."""
        ...

    def first_token(self) -> None:
        """The call's first token is there."""
        ...

    def end(self, watched: "CallWatch", kind: str | None) -> None:
        """The call is over; `kind` is that of the error that ended it."""
        ...


class CallTracer(Protocol):
    """Begins the spans of calls."""

    def begin(self, plan: "Plan") -> CallSpan | None:
        """None for a call that is not sampled."""
        ...


class Watch:
    """One gateway's. Without `tracer` and `log` it only counts."""

    def __init__(self, metrics: RequestMetrics | None = None, tracer: CallTracer | None = None, log: RequestLog | None = None) -> None:
        self.metrics = metrics or RequestMetrics()
        self.tracer = tracer
        self.log = log

    def begin(self, plan: "Plan") -> "CallWatch":
        """A call begins to run."""
        return CallWatch(self, plan)

    def refused(self, error: Exception) -> None:
        """A call was refused before it ran."""
        self.metrics.failed(getattr(error, "kind", "internal"))


class CallWatch:
    """One call. Times are on the event loop's clock, those of `plan`."""

    def __init__(self, watch: Watch, plan: "Plan") -> None:
        self.plan = plan
        self.finishes: list[FinishReason | None] = [None] * len(plan.requests)
        self.num_tokens = [0] * len(plan.requests)
        self.first_token_at: dict[int, float] = {}
        self._last_at = [0.0] * len(plan.requests)
        self._watch = watch
        self._metrics = watch.metrics
        self._kind: str | None = None
        self._span = None if watch.tracer is None else watch.tracer.begin(plan)
        self.requests = plan.requests if self._span is None else self._span.requests(plan.requests)
        for _ in plan.requests:
            self._metrics.arrived()

    @property
    def trace_id(self) -> str | None:
        """Of its span, if it has one."""
        return None if self._span is None else self._span.trace_id

    def tokens(self, index: int, num: int, now: float) -> None:
        """Answer `index` has `num` tokens more."""
        if self.num_tokens[index]:
            self._metrics.token_gap(now - self._last_at[index], num)
        else:
            if self._span is not None and not self.first_token_at:
                self._span.first_token()
            self.first_token_at[index] = now
            self._metrics.first_token(now - self.plan.arrived, len(self.plan.requests[index].prompt_token_ids), num)
        self.num_tokens[index] += num
        self._last_at[index] = now

    def ended(self, index: int, finish: FinishReason, now: float) -> None:
        """Answer `index` is over."""
        self.finishes[index] = finish
        num_prompt = len(self.plan.requests[index].prompt_token_ids)
        self._metrics.ended(finish, num_prompt, self.num_tokens[index], now - self.plan.arrived)

    def failed(self, error: Exception) -> None:
        """The call is to end with an error; `close` follows."""
        self._kind = getattr(error, "kind", "internal")
        self._metrics.failed(self._kind)

    def close(self, now: float) -> None:
        """The call is over, however: what has not ended was given up by the client, or failed with the call."""
        is_error = self._kind not in (None, "cancelled", "deadline_exceeded")
        for index, finish in enumerate(self.finishes):
            if finish is None:
                self.ended(index, "error" if is_error else "cancelled", now)
        if self._span is not None:
            self._span.end(self, self._kind)
        if self._watch.log is not None:
            self._watch.log.write(self, self._kind, now)
