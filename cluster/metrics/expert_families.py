"""The series that only an engine of experts has: tokens and replicas of each layer, and of each expert where those are not too many."""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.metrics.snapshot import Snapshot
from model.logical_expert import LogicalExpert


def expert_families(snapshot: Snapshot, prefix: str, max_experts: int) -> Iterator[Metric]:
    """Four series a layer; two an expert if the model has at most `max_experts` of them, over all layers."""
    tokens = snapshot.expert_tokens
    placement = snapshot.placement
    replicas = {expert: len(hosts) for expert, hosts in placement.expert_to_hosts.items()} if placement else {}
    yield from _layers(snapshot.model_name, prefix, tokens, replicas)
    if snapshot.num_experts > max_experts:
        return
    labels = ("model_name", "layer", "expert")
    routed = CounterMetricFamily(prefix + "expert_tokens", "Tokens routed to the expert.", labels=labels)
    copies = GaugeMetricFamily(prefix + "expert_replicas", "Hosts that the published map names for the expert.", labels=labels)
    for expert in sorted(replicas.keys() | tokens.keys()):
        values = (snapshot.model_name, str(expert.layer), str(expert.expert))
        routed.add_metric(values, tokens.get(expert, 0))
        copies.add_metric(values, replicas.get(expert, 0))
    yield routed
    yield copies


def _layers(model: str, prefix: str, tokens: Mapping[LogicalExpert, int], replicas: Mapping[LogicalExpert, int]) -> Iterator[Metric]:
    routed, busiest, copies, experts = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
    for expert in replicas.keys() | tokens.keys():
        count = tokens.get(expert, 0)
        routed[expert.layer] += count
        busiest[expert.layer] = max(busiest[expert.layer], count)
        copies[expert.layer] += replicas.get(expert, 0)
        experts[expert.layer] += 1
    labels = ("model_name", "layer")
    families: dict[str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, Counter[int]]] = {
        "layer_tokens": (CounterMetricFamily, "Tokens routed to the layer's experts: top-k each.", routed),
        "layer_busiest_expert_tokens": (CounterMetricFamily, "Tokens of the layer's busiest expert since the start.", busiest),
        "layer_experts": (GaugeMetricFamily, "Routed experts of the layer.", experts),
        "layer_replicas": (GaugeMetricFamily, "Replicas of the layer's experts in the published map.", copies),
    }
    for name, (kind, text, values) in families.items():
        family = kind(prefix + name, text, labels=labels)
        for layer in sorted(experts):
            family.add_metric((model, str(layer)), values[layer])
        yield family
