"""Spans of a router, kept in memory: requests, the steps that are looked into, and their layers."""

import pytest
import torch

from model.experts import LocalExperts
from router.request import Delta, Request, SamplingParams
from router.service import RouterService
from tests.reference.local_generation import LocalGenerator

otel = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def exporter():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def tracer_of(exporter, dispatch_share=1.0, draw=lambda: 0.5):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from actors.router_tracing import RouterTracer

    provider = otel.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return RouterTracer(provider.get_tracer("test"), dispatch_share, draw)


def request(name, traceparent=TRACEPARENT):
    return Request(request_id=name, prompt_token_ids=(5, 6, 7), sampling=SamplingParams(), traceparent=traceparent)


class Experts:
    """Answers at once; a handle is an object of its own."""

    def dispatch(self, layer, hidden, routing):
        return object()

    def combine(self, handle):
        return torch.zeros(1)

    def abandon(self, handle):
        pass


class Choice:
    expert_ids = torch.zeros((2, 6), dtype=torch.int16)


def layer(experts, number):
    return experts.dispatch(number, torch.zeros((2, 4)), Choice())


def test_a_request_is_a_span_of_its_gateway_s_trace(exporter):
    tracer = tracer_of(exporter)
    tracer.began(request("a"))
    tracer.said([Delta("a", (5,)), Delta("another", (5,))])
    tracer.said([Delta("a", (6, 7), finish="stop")])
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert (span.attributes["shoal.num_generated_tokens"], span.attributes["shoal.finish"]) == (3, "stop")
    assert [event.name for event in span.events] == ["first_token"]


def test_requests_without_a_trace_and_steps_without_a_traced_request_have_no_spans(exporter):
    tracer = tracer_of(exporter)
    tracer.began(request("a", None))
    tracer.began(request("b", f"00-{TRACE}-00f067aa0ba902b7-00"))
    tracer.step_begins()
    assert tracer.step is None
    tracer.step_ends()
    tracer.said([Delta("a", finish="stop")])
    tracer.ended("b", "cancelled")
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(("share", "is_watched"), [(0.0, False), (0.4, False), (0.6, True), (1.0, True)])
def test_a_share_of_the_steps_is_looked_into_layer_by_layer(exporter, share, is_watched):
    tracer = tracer_of(exporter, share)
    experts = tracer.experts(Experts())
    tracer.began(request("a"))
    tracer.began(request("b"))
    tracer.step_begins()
    for number in (1, 2):
        experts.combine(layer(experts, number))
    tracer.step_ends()
    tracer.ended("a", "cancelled")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert ("shoal.router.step" in spans) == is_watched
    if is_watched:
        step, dispatch = spans["shoal.router.step"], spans["shoal.dispatch"]
        assert len(step.links) == 1
        assert dispatch.parent.span_id == step.context.span_id
        assert dispatch.attributes["shoal.layer"] == 2
        assert dispatch.attributes["shoal.num_tokens"] == 2
        assert sum(span.name == "shoal.dispatch" for span in exporter.get_finished_spans()) == 2


def test_a_dispatch_that_is_given_up_ends_its_span(exporter):
    tracer = tracer_of(exporter)
    experts = tracer.experts(Experts())
    tracer.began(request("a"))
    tracer.step_begins()
    experts.abandon(layer(experts, 1))
    tracer.step_ends()
    dispatch = exporter.get_finished_spans()[0]
    assert (dispatch.name, dispatch.attributes["shoal.abandoned"]) == ("shoal.dispatch", True)


def test_the_router_s_own_loop_tells_its_tracer(exporter, tmp_path):
    import queue

    from router import wire
    from router.engine import Engine, EngineConfig
    from router.transport.messages import decode_message, encode_message
    from tests.tiny_models import write_tiny

    class Gateway:
        deltas = queue.SimpleQueue()

        def send(self, message):
            for delta in wire.deltas_from_wire(decode_message(encode_message(1, message)[1])):
                self.deltas.put(delta)

        def hang_up(self):
            pass

    tracer = tracer_of(exporter)
    local = LocalGenerator.load(write_tiny("v2-lite", tmp_path), num_pages=1)
    assert isinstance(local.experts, LocalExperts)
    config = EngineConfig(num_pages=8, max_model_len=64)
    engine = Engine(local.model, tracer.experts(local.experts), config, torch.device("cpu"))
    service = RouterService(engine, None, lambda: None, tracer)
    try:
        gateway = Gateway()
        asked = request("a").model_copy(update={"sampling": SamplingParams(max_tokens=3, ignore_eos=True)})
        service.on_message(gateway, wire.submit(asked))
        while gateway.deltas.get(timeout=30).finish is None:
            pass
    finally:
        service.close()
    spans = exporter.get_finished_spans()
    counted = {name: sum(span.name == name for span in spans) for name in {span.name for span in spans}}
    assert counted == {"shoal.router.request": 1, "shoal.router.step": 3, "shoal.dispatch": 3 * len(local.model.config.moe_layers)}
    assert {span.context.trace_id for span in spans} == {int(TRACE, 16)}
    assert service.step_s > 0
    assert sum(engine.queue_time.counts) == 1
