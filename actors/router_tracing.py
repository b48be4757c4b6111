"""Spans of a router: one for each traced request, and for some steps one for each layer's way to the experts and back.

Imported only where tracing is configured.
"""

import random
from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from torch import Tensor

from model.experts import Experts
from model.gate import Routing
from router.request import Delta, Request

MAX_LINKS = 32


class RouterTracer:
    """The engine's thread calls it. Of the steps in which a traced request is under way, `dispatch_share` are looked into."""

    def __init__(self, tracer: Tracer, dispatch_share: float, draw: Callable[[], float] = random.random) -> None:
        self._tracer = tracer
        self._dispatch_share = dispatch_share
        self._draw = draw
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[str, Span] = {}
        self._num_tokens: dict[str, int] = {}
        self._step: Span | None = None

    @property
    def step(self) -> Context | None:
        """The context for spans inside the present step; None if it is not looked into."""
        return None if self._step is None else set_span_in_context(self._step)

    @property
    def tracer(self) -> Tracer:
        """Where spans begin."""
        return self._tracer

    def experts(self, experts: Experts) -> "TracedExperts":
        """The experts for the engine, so that their dispatches can be seen."""
        return TracedExperts(experts, self)

    def began(self, request: Request) -> None:
        """A request was let in."""
        if request.traceparent is None:
            return
        context = self._propagator.extract({"traceparent": request.traceparent})
        span = self._tracer.start_span("shoal.router.request", context, SpanKind.SERVER, {"shoal.router_request_id": request.request_id})
        if span.is_recording():
            span.set_attribute("shoal.num_prompt_tokens", len(request.prompt_token_ids))
            span.set_attribute("shoal.num_generated_before", len(request.generated_token_ids))
            self._open[request.request_id] = span
            self._num_tokens[request.request_id] = 0

    def said(self, deltas: list[Delta]) -> None:
        """What a step, or a refusal, says to gateways."""
        if not self._open:
            return
        for delta in deltas:
            span = self._open.get(delta.request_id)
            if span is None:
                continue
            if delta.token_ids and not self._num_tokens[delta.request_id]:
                span.add_event("first_token")
            self._num_tokens[delta.request_id] += len(delta.token_ids)
            if delta.finish is not None:
                self.ended(delta.request_id, delta.finish)

    def ended(self, request_id: str, finish: str) -> None:
        """A request is over; one that is not traced is ignored."""
        span = self._open.pop(request_id, None)
        if span is not None:
            span.set_attribute("shoal.num_generated_tokens", self._num_tokens.pop(request_id))
            span.set_attribute("shoal.finish", finish)
            span.end()

    def step_begins(self) -> None:
        """A step begins. It serves many requests, so it is a trace's child in the first of them and linked to the others."""
        if not self._open or self._draw() >= self._dispatch_share:
            return
        first, *others = [*self._open.values()][: MAX_LINKS + 1]
        links = [Link(span.get_span_context()) for span in others]
        self._step = self._tracer.start_span("shoal.router.step", set_span_in_context(first), links=links)
        self._step.set_attribute("shoal.num_traced_requests", len(self._open))

    def step_ends(self) -> None:
        """The step is over."""
        if self._step is not None:
            self._step.end()
            self._step = None


class TracedExperts:
    """Experts whose every dispatch in a step that is looked into is a span, from sending to the sum of the answers."""

    def __init__(self, experts: Experts, tracer: RouterTracer) -> None:
        self._experts = experts
        self._tracer = tracer
        self._spans: dict[int, Span] = {}

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """See model.experts.Experts."""
        context = self._tracer.step
        if context is None:
            return self._experts.dispatch(layer, hidden, routing)
        attributes = {"shoal.layer": layer, "shoal.num_tokens": len(hidden), "shoal.num_experts_per_token": routing.expert_ids.shape[1]}
        span = self._tracer.tracer.start_span("shoal.dispatch", context, SpanKind.CLIENT, attributes)
        handle = self._experts.dispatch(layer, hidden, routing)
        span.add_event("sent", {"shoal.num_hosts": len(getattr(handle, "sent", ()))})
        self._spans[id(handle)] = span
        return handle

    def combine(self, handle: object) -> Tensor:
        """See model.experts.Experts."""
        span = self._spans.pop(id(handle), None)
        if span is None:
            return self._experts.combine(handle)
        span.add_event("waits")
        try:
            return self._experts.combine(handle)
        finally:
            span.end()

    def abandon(self, handle: object) -> None:
        """See model.experts.Experts."""
        span = self._spans.pop(id(handle), None)
        if span is not None:
            span.set_attribute("shoal.abandoned", True)
            span.end()
        self._experts.abandon(handle)
