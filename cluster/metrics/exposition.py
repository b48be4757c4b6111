"""A snapshot in Prometheus' text format. A pure function of it; takes some milliseconds for every thousand series."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from actors.metrics import SUM, Sums
from cluster.metrics.catalogue import BOUNDS, COUNTERS, HISTOGRAMS, KNOWN, SUMMARIES
from cluster.metrics.expert_families import expert_families
from cluster.metrics.snapshot import Gauges, Snapshot

__all__ = ["CONTENT_TYPE_LATEST", "metrics_text"]

PREFIX = "shoal_"
MEMBER_EVENTS = ("host_joined", "host_left", "host_lost", "router_joined", "router_left", "router_lost")
ROUTER_GAUGES = {
    "num_requests_running": ("num_running", "Requests that hold KV pages."),
    "num_requests_waiting": ("num_waiting", "Requests that wait for a place."),
    "kv_cache_usage_perc": ("kv_use", "Share of the KV pages in use, 0 to 1."),
    "router_map_version": ("map_n", "The placement map that the router has adopted: the second part of its version."),
}
HOST_GAUGES = {
    "host_busy_ratio": ("busy_share", "Share of the last seconds that the host computed, 0 to 1."),
    "host_tokens_per_second": ("tokens_per_s", "Tokens of the last seconds."),
    "host_queue_wait_mean_seconds": ("wait_s", "Mean wait of the last seconds' frames."),
    "host_queued_tokens": ("queued_tokens", "Tokens that wait or are computed."),
    "host_experts": ("num_experts", "Experts that the host holds ready."),
    "host_suspected": ("is_suspected", "1 while a router cannot reach the host."),
}


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def metrics_text(snapshot: Snapshot, max_experts: int) -> bytes:
    """The text, UTF-8. Series of single experts only where the model has at most `max_experts`; its layers' are always there."""
    return generate_latest(_Families(_families(snapshot, max_experts)))


def _families(snapshot: Snapshot, max_experts: int) -> Iterator[Metric]:
    model = snapshot.model_name
    yield from _counters(snapshot.sums, model)
    yield from _summaries(snapshot.sums, model)
    yield from _histograms(snapshot.sums, model)
    yield from _member_gauges("router", ROUTER_GAUGES, snapshot.routers, model)
    yield from _member_gauges("host", HOST_GAUGES, snapshot.hosts, model)
    yield from _member_gauges("gateway", {"num_requests_open": ("num_open", "Answers under way.")}, snapshot.gateways, model)
    yield _members(snapshot)
    yield from _placement(snapshot)
    yield from _decisions(snapshot)
    yield from expert_families(snapshot, PREFIX, max_experts)


def _counters(sums: Sums, model: str) -> Iterator[Metric]:
    told: dict[str, dict[tuple[str, ...], float]] = {name: {(known,): 0.0 for known in KNOWN.get(name, ())} for name in COUNTERS}
    for (name, *labels), value in sums.items():
        if name in told:
            told[name][tuple(labels)] = value
    for name, about in COUNTERS.items():
        family = CounterMetricFamily(PREFIX + name, about.text, labels=("model_name", *about.labels))
        values = told[name] if about.labels else told[name] or {(): 0.0}
        for label_values, value in sorted(values.items()):
            family.add_metric((model, *label_values), value)
        yield family


def _summaries(sums: Sums, model: str) -> Iterator[Metric]:
    for name, about in SUMMARIES.items():
        family = SummaryMetricFamily(PREFIX + name, about.text, labels=("model_name",))
        family.add_metric((model,), count_value=int(sums.get((name, "count"), 0.0)), sum_value=sums.get((name, SUM), 0.0))
        yield family


def _histograms(sums: Sums, model: str) -> Iterator[Metric]:
    for name, about in HISTOGRAMS.items():
        buckets, so_far = [], 0.0
        for index, bound in enumerate((*BOUNDS[name], float("inf"))):
            so_far += sums.get((name, str(index)), 0.0)
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), so_far))
        family = HistogramMetricFamily(PREFIX + name, about.text, labels=("model_name",))
        family.add_metric((model,), buckets, sums.get((name, SUM), 0.0))
        yield family


def _member_gauges(role: str, names: Mapping[str, tuple[str, str]], members: Mapping[str, Gauges], model: str) -> Iterator[Metric]:
    """A series for each member that lives: those of the dead go with them."""
    for name, (key, text) in names.items():
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name", role))
        for member, gauges in sorted(members.items()):
            if key in gauges:
                family.add_metric((model, member), gauges[key])
        yield family


def _members(snapshot: Snapshot) -> Metric:
    family = GaugeMetricFamily(PREFIX + "members", "Members under a lease.", labels=("model_name", "role"))
    for role, members in (("gateway", snapshot.gateways), ("router", snapshot.routers), ("expert_host", snapshot.hosts)):
        family.add_metric((snapshot.model_name, role), len(members))
    return family


def _placement(snapshot: Snapshot) -> Iterator[Metric]:
    version = snapshot.placement.version if snapshot.placement else None
    replicas = snapshot.placement.expert_to_hosts.values() if snapshot.placement else ()
    epoch, n = (None, None) if version is None else version
    gauges: dict[str, tuple[str, float | None]] = {
        "placement_map_epoch": ("First part of the published map's version: the life of the coordinator.", epoch),
        "placement_map_version": ("Second part of the published map's version: grows with every map.", n),
        "placement_experts": ("Routed experts of the model.", snapshot.num_experts),
        "placement_experts_ready": ("Experts that some host holds.", snapshot.num_experts_ready),
        "placement_experts_standalone": ("Experts with one replica only.", sum(len(hosts) < 2 for hosts in replicas)),
        "placement_replicas": ("Replicas that the published map names.", sum(len(hosts) for hosts in replicas)),
        "balancedness": (
            "Mean load of the hosts / that of the busiest, over the last seconds; absent without load.",
            snapshot.balancedness,
        ),
        "balancedness_planned": ("What the last plan expects of it.", snapshot.planned_balancedness),
    }
    for name, (text, value) in gauges.items():
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        if value is not None:
            family.add_metric((snapshot.model_name,), value)
        yield family


def _decisions(snapshot: Snapshot) -> Iterator[Metric]:
    model = snapshot.model_name
    for name, text, value in (
        ("placement_moves_total", "Replicas that plans gave to a host to load.", snapshot.num_moves),
        ("placement_moved_bytes_total", "Bytes of those.", snapshot.num_moved_bytes),
        ("placement_maps_published_total", "Maps published.", snapshot.decisions.get("publish", 0)),
    ):
        plain = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        plain.add_metric((model,), value)
        yield plain
    decisions = CounterMetricFamily(PREFIX + "decisions", "What the coordinator decided and saw, by kind.", labels=("model_name", "kind"))
    for kind, count in sorted(snapshot.decisions.items()):
        decisions.add_metric((model, kind), count)
    yield decisions
    events = CounterMetricFamily(
        PREFIX + "member_events", "Members that came, left of their own accord, or were lost.", labels=("model_name", "event")
    )
    for event in MEMBER_EVENTS:
        events.add_metric((model, event), snapshot.member_events.get(event, 0))
    yield events
