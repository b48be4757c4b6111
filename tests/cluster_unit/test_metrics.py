"""What an application tells Prometheus, read by prometheus_client's own parser."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from actors.exchange import GatewayReport
from actors.metrics import HostSums, histogram_sums, router_sums
from cluster.coordinator import Coordinator
from cluster.coordinator_limits import CoordinatorLimits
from cluster.metrics.application_metrics import ApplicationMetrics
from cluster.metrics.catalogue import BOUNDS, COUNTERS, HISTOGRAMS
from cluster.metrics.exposition import metrics_text
from cluster.metrics.ledger import MAX_MEMBERS, SumsLedger
from cluster.metrics.request_metrics import MAX_KINDS, RequestMetrics
from model.logical_expert import LogicalExpert
from router.histogram import Histogram
from router.placement_map import HostKey
from tests.cluster_unit.made_up_members import Clock, Host, Router

EXPERTS = [LogicalExpert(layer, expert) for layer in (1, 2) for expert in range(4)]
MODEL = {"model_name": "tiny"}


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """{(name, sorted labels but the model's): value} of every sample."""
    return {
        (sample.name, tuple(sorted(sample.labels.items() - MODEL.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


class Cluster:
    """A Coordinator with two hosts and a router on a made-up clock, and its metrics."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.coordinator = Coordinator(EXPERTS, CoordinatorLimits(num_hosts=2, num_routers=1), self.clock)
        self.metrics = ApplicationMetrics("tiny", lease_s=5.0)
        self.members = [Host("a"), Host("b"), Router()]
        self.rounds(5)

    def rounds(self, num: int) -> None:
        for _ in range(num):
            for member in self.members:
                member.exchange(self.coordinator)
            self.clock.now += 1

    def samples(self, max_experts: int = 100) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return samples(metrics_text(self.metrics.snapshot(self.coordinator, self.clock.now), max_experts))


@pytest.fixture
def cluster():
    return Cluster()


def one_answer(metrics: RequestMetrics, seconds=(0.02, 0.03, 0.2), tokens: int = 4) -> None:
    first_s, gap_s, total_s = seconds
    metrics.arrived()
    metrics.first_token(first_s, prompt_tokens=7)
    for _ in range(tokens - 1):
        metrics.token_gap(gap_s)
    metrics.ended("length", 7, tokens, total_s)


def report(name: str, metrics: RequestMetrics, incarnation: int = 1) -> GatewayReport:
    return GatewayReport(HostKey(name, incarnation), metrics.sums(), {"num_open": float(metrics.num_open)})


# -- what gateways count


def test_requests_under_the_names_that_vllm_has(cluster):
    metrics = RequestMetrics()
    one_answer(metrics)
    metrics.arrived()
    metrics.failed("queue_full")
    cluster.metrics.hear_gateway(report("g", metrics), cluster.clock.now)
    told = cluster.samples()
    assert told["shoal_prompt_tokens_total", ()] == 7
    assert told["shoal_generation_tokens_total", ()] == 4
    assert told["shoal_request_success_total", (("finished_reason", "length"),)] == 1
    assert told["shoal_request_success_total", (("finished_reason", "stop"),)] == 0
    assert told["shoal_request_failures_total", (("kind", "queue_full"),)] == 1
    assert told["shoal_num_requests_open", (("gateway", "g"),)] == 1
    assert told["shoal_time_to_first_token_seconds_count", ()] == 1
    assert told["shoal_time_to_first_token_seconds_sum", ()] == pytest.approx(0.02)
    assert told["shoal_inter_token_latency_seconds_count", ()] == 3
    assert told["shoal_inter_token_latency_seconds_bucket", (("le", "0.025"),)] == 0
    assert told["shoal_inter_token_latency_seconds_bucket", (("le", "0.05"),)] == 3
    assert told["shoal_inter_token_latency_seconds_bucket", (("le", "+Inf"),)] == 3
    assert told["shoal_e2e_request_latency_seconds_bucket", (("le", "0.2"),)] == 1, "a bucket has what equals its bound"
    assert told["shoal_request_prompt_tokens_bucket", (("le", "10.0"),)] == 1
    assert told["shoal_request_generation_tokens_sum", ()] == 4


def test_two_gateways_are_one_application_and_a_dead_one_stays_counted(cluster):
    first, second = RequestMetrics(), RequestMetrics()
    one_answer(first)
    one_answer(second, tokens=10)
    for name, metrics in (("g", first), ("h", second)):
        cluster.metrics.hear_gateway(report(name, metrics), cluster.clock.now)
    assert cluster.samples()["shoal_generation_tokens_total", ()] == 14
    cluster.clock.now += 4
    cluster.metrics.hear_gateway(report("h", second), cluster.clock.now)
    cluster.rounds(2)  # g is silent for longer than its lease now
    told = cluster.samples()
    assert told["shoal_generation_tokens_total", ()] == 14
    assert ("shoal_num_requests_open", (("gateway", "g"),)) not in told
    assert told["shoal_members", (("role", "gateway"),)] == 1
    cluster.metrics.hear_gateway(report("g", RequestMetrics(), incarnation=2), cluster.clock.now)
    assert cluster.samples()["shoal_generation_tokens_total", ()] == 14, "a new life begins at nothing, and takes nothing away"


def test_kinds_of_failure_cannot_grow_without_bound():
    metrics = RequestMetrics()
    for number in range(3 * MAX_KINDS):
        metrics.failed(f"kind_{number}")
    kinds = {series[1]: count for series, count in metrics.sums().items() if series[0] == "request_failures_total"}
    assert len(kinds) <= MAX_KINDS + 1
    assert sum(kinds.values()) == 3 * MAX_KINDS


# -- sums that only grow


def test_a_lost_or_overtaken_report_loses_nothing():
    ledger = SumsLedger()
    series = ("requests_total",)
    ledger.take("g", {series: 5.0})
    ledger.take("g", {series: 9.0})
    ledger.take("g", {series: 7.0})  # was held up on its way
    ledger.take("g", {series: 9.0})
    ledger.take("h", {series: 1.0})
    assert ledger.totals[series] == 10


def test_the_ledger_forgets_the_longest_silent_but_not_what_they_told():
    ledger = SumsLedger()
    for number in range(MAX_MEMBERS + 10):
        ledger.take(number, {("requests_total",): 1.0})
        ledger.take("alive", {("requests_total",): 1.0})
    assert ledger.totals["requests_total",] == MAX_MEMBERS + 11


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), max_size=40))
def test_totals_never_fall_whatever_order_reports_come_in(reports):
    ledger, before = SumsLedger(), 0.0
    highest = {}
    for member, value in reports:
        ledger.take(member, {("s",): float(value)})
        highest[member] = max(highest.get(member, 0), value)
        total = ledger.totals.get(("s",), 0.0)
        assert total >= before
        assert total == sum(highest.values())
        before = total


@given(st.lists(st.floats(0, 3000), max_size=50))
def test_a_histogram_counts_what_is_at_most_each_bound(values):
    histogram = Histogram(BOUNDS["e2e_request_latency_seconds"])
    for value in values:
        histogram.observe(value)
    for index, bound in enumerate(histogram.bounds):
        assert sum(histogram.counts[: index + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert sum(count for series, count in histogram_sums("h", histogram).items() if series[1] != "sum") == len(values)


# -- what routers and hosts count


def test_routers_and_hosts(cluster):
    queue_time = Histogram(BOUNDS["request_queue_time_seconds"])
    queue_time.observe(0.25)
    load = {"num_steps": 40.0, "num_prefill_tokens": 300.0, "num_generated_tokens": 80.0, "num_preemptions": 2.0, "kv_use": 0.5}
    cluster.metrics.hear(HostKey("r", 1), router_sums(load, 1.5, 90, {"lost": 3, "slow": 1}, queue_time))
    host = HostSums()
    host.add({"num_frames": 10.0, "queue_wait_s": 0.5, "num_tokens": 64.0, "busy_s": 0.2, "num_busy": 1.0})
    cluster.metrics.hear(HostKey("a", 1), host.add({"num_frames": 5.0, "queue_wait_s": 0.25}))
    told = cluster.samples()
    assert told["shoal_num_preemptions_total", ()] == 2
    assert told["shoal_dispatch_resends_total", (("reason", "lost"),)] == 3
    assert told["shoal_dispatch_resends_total", (("reason", "silent"),)] == 0
    assert told["shoal_router_step_seconds_total", ()] == 1.5
    assert told["shoal_request_queue_time_seconds_bucket", (("le", "0.2"),)] == 0
    assert told["shoal_request_queue_time_seconds_bucket", (("le", "0.3"),)] == 1
    assert told["shoal_dispatch_queue_wait_seconds_count", ()] == 15
    assert told["shoal_dispatch_queue_wait_seconds_sum", ()] == 0.75
    assert told["shoal_host_refused_frames_total", (("reason", "busy"),)] == 1


def test_gauges_are_of_members_that_live(cluster):
    router = cluster.members[2]
    stats = {"num_running": 3.0, "num_waiting": 2.0, "kv_use": 0.25}
    router.exchange(cluster.coordinator, stats=stats)
    told = cluster.samples()
    assert told["shoal_num_requests_running", (("router", "r"),)] == 3
    assert told["shoal_num_requests_waiting", (("router", "r"),)] == 2
    assert told["shoal_kv_cache_usage_perc", (("router", "r"),)] == 0.25
    assert told["shoal_host_experts", (("host", "a"),)] == 4
    cluster.members = cluster.members[:2]
    cluster.rounds(7)
    told = cluster.samples()
    assert ("shoal_num_requests_running", (("router", "r"),)) not in told
    assert told["shoal_member_events_total", (("event", "router_lost"),)] == 1
    assert told["shoal_member_events_total", (("event", "host_joined"),)] == 2


# -- what nobody else has


def test_experts_by_layer_and_one_by_one(cluster):
    cluster.members[2].exchange(cluster.coordinator, expert_tokens={EXPERTS[0]: 30, EXPERTS[1]: 10, EXPERTS[5]: 8})
    told = cluster.samples()
    assert told["shoal_expert_tokens_total", (("expert", "0"), ("layer", "1"))] == 30
    assert told["shoal_expert_tokens_total", (("expert", "3"), ("layer", "2"))] == 0
    assert told["shoal_expert_replicas", (("expert", "0"), ("layer", "1"))] == 1
    assert told["shoal_layer_tokens_total", (("layer", "1"),)] == 40
    assert told["shoal_layer_busiest_expert_tokens_total", (("layer", "1"),)] == 30
    assert told["shoal_layer_replicas", (("layer", "2"),)] == 4
    assert told["shoal_placement_replicas", ()] == 8


def test_beyond_the_limit_there_are_layers_only(cluster):
    names = {name for name, _ in cluster.samples(max_experts=len(EXPERTS) - 1)}
    assert "shoal_layer_tokens_total" in names
    assert not {"shoal_expert_tokens_total", "shoal_expert_replicas"} & names
    assert "shoal_expert_tokens_total" in {name for name, _ in cluster.samples(max_experts=len(EXPERTS))}


def test_the_map_moves_and_decisions(cluster):
    told = cluster.samples()
    version = cluster.coordinator.maps.current.version
    assert told["shoal_placement_map_version", ()] == version.n
    assert told["shoal_placement_map_epoch", ()] == version.epoch
    assert told["shoal_router_map_version", (("router", "r"),)] == version.n
    assert told["shoal_placement_moves_total", ()] == len(EXPERTS)
    assert told["shoal_placement_experts_standalone", ()] == len(EXPERTS)
    cluster.coordinator.drain("a")
    cluster.rounds(4)
    later = cluster.samples()
    assert later["shoal_placement_moves_total", ()] == len(EXPERTS) + 4
    assert later["shoal_placement_maps_published_total", ()] > told["shoal_placement_maps_published_total", ()]
    assert later["shoal_placement_map_version", ()] > version.n
    assert later["shoal_decisions_total", (("kind", "plan"),)] == told["shoal_decisions_total", (("kind", "plan"),)] + 1


def test_balancedness_is_absent_without_load_and_there_with_it(cluster):
    assert ("shoal_balancedness", ()) not in cluster.samples()
    for host, tokens in zip(cluster.members, (30.0, 10.0), strict=False):
        host.report = host.report.__class__(**{**host.report.__dict__, "stats": {"num_tokens": tokens, "num_frames": 1.0, "busy_s": 0.1}})
        host.exchange(cluster.coordinator)
    assert cluster.samples()["shoal_balancedness", ()] == pytest.approx(20 / 30, rel=1e-3)


def test_a_dense_model_and_an_empty_application_have_a_page_too():
    clock = Clock()
    coordinator = Coordinator([], CoordinatorLimits(num_hosts=0, num_routers=1), clock)
    told = samples(metrics_text(ApplicationMetrics("tiny", 5.0).snapshot(coordinator, clock.now), 100))
    assert told["shoal_placement_experts", ()] == 0
    assert told["shoal_requests_total", ()] == 0


def test_every_series_of_the_catalogue_is_on_the_page_and_well_formed(cluster):
    families = {family.name: family for family in text_string_to_metric_families(_page(cluster).decode())}
    assert {f"shoal_{name.removesuffix('_total')}" for name in COUNTERS} | {f"shoal_{name}" for name in HISTOGRAMS} <= set(families)
    assert all(family.documentation for family in families.values())
    assert all(sample.labels["model_name"] == "tiny" for family in families.values() for sample in family.samples)
    for name in HISTOGRAMS:
        counts = [sample.value for sample in families[f"shoal_{name}"].samples if sample.name.endswith("_bucket")]
        assert counts == sorted(counts)
        assert len(counts) == len(BOUNDS[name]) + 1


def _page(cluster: Cluster) -> bytes:
    return metrics_text(cluster.metrics.snapshot(cluster.coordinator, cluster.clock.now), 100)


async def test_a_snapshot_is_made_of_copies(cluster):
    metrics = RequestMetrics()
    one_answer(metrics)
    cluster.metrics.hear_gateway(report("g", metrics), cluster.clock.now)
    snapshot = cluster.metrics.snapshot(cluster.coordinator, cluster.clock.now)
    before = await asyncio.to_thread(metrics_text, snapshot, 100)
    one_answer(metrics)
    cluster.metrics.hear_gateway(report("g", metrics), cluster.clock.now)
    cluster.coordinator.loads.add_tokens({EXPERTS[0]: 99}, cluster.clock.now)
    assert metrics_text(snapshot, 100) == before
