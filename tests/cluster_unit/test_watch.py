"""What a gateway counts, traces and writes down of the calls that pass through a real text service."""

import asyncio
import json

import pytest

from actors.metrics import SUM
from cluster.api.errors import ModelNotFound, RequestRefused
from cluster.api.service import Call
from cluster.api.trace_context import TraceContext
from cluster.metrics.request_log import RequestLog
from cluster.metrics.watch import Watch
from router.errors import InvalidRequest, QueueFull
from router.request import Delta, Failure
from tests.cluster_unit.front_door import each, make_service, says

otel = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
PARENT = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", is_sampled=True)


def call(**fields):
    fields.setdefault("prompts", ((5, 6, 7),))
    return Call("the-id", **fields)


async def run(service, wanted):
    plan = await service.plan(wanted)
    return [delta async for delta in each(service.run(plan))]


class Tracing:
    """A call tracer whose spans stay here."""

    def __init__(self, share: float = 1.0) -> None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        from cluster.metrics.call_tracer import OtelCallTracer

        self.exporter = InMemorySpanExporter()
        provider = otel.TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)))
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelCallTracer(provider.get_tracer("test"), "tiny")

    @property
    def spans(self):
        return self.exporter.get_finished_spans()


# -- counting


async def test_an_answer_is_counted_token_by_token():
    watch = Watch()
    service, _ = make_service(None, says([5, 6, 7, 8]), watch=watch)
    await run(service, call(n=2, sampling={"max_tokens": 4}))
    sums = watch.metrics.sums()
    assert sums["requests_total",] == 2
    assert sums["prompt_tokens_total",] == 6
    assert sums["generation_tokens_total",] == 8
    assert sums["request_success_total", "length"] == 2
    assert sums["request_prompt_tokens", SUM] == 6
    assert sums["request_generation_tokens", SUM] == 8
    gaps = sum(count for series, count in sums.items() if series[0] == "inter_token_latency_seconds" and series[1] != SUM)
    assert gaps == 6, "the first token of each answer has no gap"
    assert watch.metrics.num_open == 0


async def test_one_delta_of_several_tokens_is_one_gap_and_all_its_tokens():
    watch = Watch()

    def script(request):
        yield Delta(request.request_id, (5, 6))
        yield Delta(request.request_id, ())
        yield Delta(request.request_id, (7, 8, 9), finish="length")

    service, _ = make_service(None, script, watch=watch)
    await run(service, call(sampling={"max_tokens": 5}))
    sums = watch.metrics.sums()
    assert sums["generation_tokens_total",] == 5
    assert sum(count for series, count in sums.items() if series[0] == "inter_token_latency_seconds" and series[1] != SUM) == 1


@pytest.mark.parametrize(
    ("step", "raised", "kind", "finish"),
    [
        (QueueFull("full"), QueueFull, "queue_full", "error"),
        (Delta("?", finish="error", failure=Failure("poisoned", "it kills hosts")), RequestRefused, "poisoned", "error"),
        (Delta("?", finish="cancelled", failure=Failure("deadline_exceeded", "too late")), RequestRefused, "deadline_exceeded", "abort"),
    ],
)
async def test_a_call_that_fails_is_counted_by_its_kind(step, raised, kind, finish):
    watch = Watch()
    service, _ = make_service(None, lambda _: [step], watch=watch)
    with pytest.raises(raised):
        await run(service, call())
    sums = watch.metrics.sums()
    assert sums["request_failures_total", kind] == 1
    assert sums["request_success_total", finish] == 1
    assert watch.metrics.num_open == 0


async def test_a_call_that_is_refused_before_it_runs_is_counted_too():
    watch = Watch()
    service, _ = make_service(None, says([5]), watch=watch)
    with pytest.raises(InvalidRequest):
        await service.plan(call(n=0))
    with pytest.raises(ModelNotFound):
        await service.plan(call(model="nobody"))
    sums = watch.metrics.sums()
    assert sums["request_failures_total", "invalid_request"] == 1
    assert sums["requests_total",] == 0


async def test_a_client_that_goes_away_is_an_abort():
    watch = Watch()
    service, _ = make_service(None, lambda request: [Delta(request.request_id, (5,)), asyncio.Event()], watch=watch)
    deltas = service.run(await service.plan(call()))
    await anext(deltas)
    assert watch.metrics.num_open == 1
    await deltas.aclose()
    assert watch.metrics.sums()["request_success_total", "abort"] == 1
    assert watch.metrics.num_open == 0


# -- the log


async def test_a_line_of_ids_lengths_and_seconds_and_never_of_content():
    lines = []
    service, router = make_service(None, says([391, 392]), watch=Watch(log=RequestLog("tiny", lines.append, lambda: 1e9)))
    await run(service, call(prompts=((377, 378, 379), (381,)), sampling={"max_tokens": 2}))
    (line,) = lines
    assert "\n" not in line
    told = json.loads(line)
    assert told["router_request_ids"] == [request.request_id for request in router.requests]
    assert 0 <= told.pop("first_token_s") <= told.pop("total_s")
    del told["router_request_ids"]
    assert told == {
        "event": "request",
        "time_unix_s": 1e9,
        "request_id": "the-id",
        "trace_id": None,
        "model": "tiny",
        "num_prompts": 2,
        "num_answers": 2,
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "finish_reasons": ["length"],
        "error": None,
    }


async def test_the_line_of_a_failure_has_its_kind():
    lines = []
    service, _ = make_service(None, lambda _: [QueueFull("full")], watch=Watch(log=RequestLog("tiny", lines.append)))
    with pytest.raises(QueueFull):
        await run(service, call())
    told = json.loads(lines[0])
    assert (told["error"], told["finish_reasons"], told["first_token_s"]) == ("queue_full", ["error"], None)


# -- the trace


async def test_a_span_continues_the_client_s_trace_and_the_routers_continue_it():
    tracing = Tracing(share=0.0)  # the client's word counts
    service, router = make_service(None, says([5, 6]), watch=Watch(tracer=tracing.tracer))
    await run(service, call(trace=PARENT, sampling={"max_tokens": 2}))
    (span,) = tracing.spans
    assert f"{span.context.trace_id:032x}" == PARENT.trace_id
    assert f"{span.parent.span_id:016x}" == PARENT.span_id
    assert router.requests[0].traceparent == f"00-{PARENT.trace_id}-{span.context.span_id:016x}-01"
    assert span.attributes["shoal.request_id"] == "the-id"
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert [event.name for event in span.events] == ["first_token"]


async def test_what_is_not_sampled_has_no_span_and_its_requests_no_traceparent():
    tracing = Tracing(share=0.0)
    service, router = make_service(None, says([5]), watch=Watch(tracer=tracing.tracer))
    await run(service, call(sampling={"max_tokens": 1}))
    assert (tracing.spans, router.requests[0].traceparent) == ((), None)


async def test_a_call_without_a_trace_begins_one_and_its_failure_is_told():
    tracing = Tracing()
    service, _ = make_service(None, lambda _: [QueueFull("full")], watch=Watch(tracer=tracing.tracer))
    with pytest.raises(QueueFull):
        await run(service, call())
    (span,) = tracing.spans
    assert span.parent is None
    assert span.attributes["error.type"] == "queue_full"
    assert not span.status.is_ok


async def test_without_tracing_a_request_goes_out_as_it_was_planned():
    service, router = make_service(None, says([5]))
    plan = await service.plan(call(trace=PARENT, sampling={"max_tokens": 1}))
    _ = [delta async for delta in each(service.run(plan))]
    assert router.requests[0] is plan.requests[0]
