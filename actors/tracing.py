"""OpenTelemetry where an OTLP endpoint is configured; nothing of it is imported where none is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class TracingSetup:
    """`endpoint` is the collector's OTLP/HTTP address. Of calls that come without a trace of their own, `share` begin one.

    `dispatch_share` is of a router's steps: the layers of those have spans of their own.
    """

    endpoint: str
    application: str
    share: float
    dispatch_share: float


def open_provider(setup: TracingSetup, role: str) -> "TracerProvider":
    """Spans go out in the background, in batches; a collector that is away costs spans, never a request."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    endpoint = setup.endpoint.rstrip("/")
    url = endpoint if endpoint.endswith(TRACES_PATH) else endpoint + TRACES_PATH
    resource = Resource.create({"service.name": f"shoal-{role}", "service.namespace": setup.application})
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(setup.share)), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider
