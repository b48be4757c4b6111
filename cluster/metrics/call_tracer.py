"""Spans of calls at a gateway, under OpenTelemetry's names for generative AI. Imported only where tracing is configured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer

from cluster.api.trace_context import TraceContext
from router.request import Request

if TYPE_CHECKING:
    from cluster.api.service import Plan
    from cluster.metrics.watch import CallWatch


class OtelCallTracer:
    """A server span for each call, a child of the client's where it sent a traceparent; its sampling is the client's then."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model

    def begin(self, plan: "Plan") -> "OtelCallSpan | None":
        """See cluster.metrics.watch.CallTracer."""
        parent = plan.call.trace
        context = None if parent is None else trace.set_span_in_context(NonRecordingSpan(_span_context(parent)))
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": "text_completion" if plan.call.messages is None else "chat",
            "gen_ai.request.model": self._model,
            "gen_ai.request.choice.count": plan.call.n,
            "gen_ai.usage.input_tokens": sum(map(len, plan.prompts)),
            "shoal.request_id": plan.call.request_id,
        }
        span = self._tracer.start_span("shoal.call", context, SpanKind.SERVER, attributes)
        return OtelCallSpan(span) if span.is_recording() else None


class OtelCallSpan:
    """See cluster.metrics.watch.CallSpan."""

    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self._context = TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", is_sampled=True)
        self.trace_id = self._context.trace_id

    def requests(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """See CallSpan."""
        return tuple(request.model_copy(update={"traceparent": self._context.as_text()}) for request in requests)

    def first_token(self) -> None:
        """See CallSpan."""
        self._span.add_event("first_token")

    def end(self, watched: "CallWatch", kind: str | None) -> None:
        """See CallSpan."""
        self._span.set_attribute("gen_ai.usage.output_tokens", sum(watched.num_tokens))
        self._span.set_attribute("gen_ai.response.finish_reasons", [str(finish) for finish in watched.finishes])
        if kind is not None:
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR, kind))
        self._span.end()


def _span_context(context: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.is_sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags)
