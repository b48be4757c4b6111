"""Prints the Grafana dashboard: `python k8s/monitoring/dashboard.py > k8s/monitoring/dashboard.json`.

Needs nothing but Python. The columns of a row share its width; a panel is a title, a kind, a unit and its queries with their legends.
"""

import json
from dataclasses import dataclass
from typing import Any

CHOSEN = 'namespace=~"$namespace", ray_cluster=~"$ray_cluster", model_name=~"$model"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 24, 7


@dataclass(frozen=True)
class Panel:
    """`queries`: legend -> PromQL, with {} for the matchers of the variables. `unit` is Grafana's name of it."""

    title: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    text: str = ""


def rate(counter: str, by: str = "", matchers: str = "") -> str:
    """Per second, summed."""
    chosen = f"{{{matchers}, {CHOSEN}}}" if matchers else f"{{{CHOSEN}}}"
    return f"sum{f' by ({by})' if by else ''} (rate(shoal_{counter}{chosen}[$__rate_interval]))"


def quantile(share: float, histogram: str) -> str:
    """Of a histogram's last interval."""
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', 'le')})"


def gauge(name: str, matchers: str = "") -> str:
    """As it is."""
    return f"shoal_{name}{{{matchers}, {CHOSEN}}}" if matchers else f"shoal_{name}{{{CHOSEN}}}"


def latencies(histogram: str) -> dict[str, str]:
    """Three quantiles."""
    return {f"p{share * 100:.0f}": quantile(share, histogram) for share in (0.5, 0.95, 0.99)}


ERRORS = rate("request_success_total", matchers='finished_reason="error"') + " / " + rate("request_success_total")
ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Gateways, routers, hosts", "short", {"{{role}}": f"sum by (role) ({gauge('members')})"}, "stat"),
        Panel("Tokens generated", "short", {"a second": rate("generation_tokens_total")}, "stat"),
        Panel("First token, p95", "s", {"p95": quantile(0.95, "time_to_first_token_seconds")}, "stat"),
        Panel("Answers with an error", "percentunit", {"share": ERRORS}, "stat"),
        Panel(
            "Experts without a host, and on one only",
            "short",
            {
                "missing": f"sum({gauge('placement_experts')}) - sum({gauge('placement_experts_ready')})",
                "stand alone": f"sum({gauge('placement_experts_standalone')})",
            },
            "stat",
        ),
        Panel("Balancedness", "percentunit", {"now": f"avg({gauge('balancedness')})"}, "stat", "mean host load / busiest host load"),
    ],
    "Requests": [
        Panel("Tokens a second", "short", {"generated": rate("generation_tokens_total"), "of prompts": rate("prompt_tokens_total")}),
        Panel("Answers, by how they ended", "reqps", {"{{finished_reason}}": rate("request_success_total", "finished_reason")}),
        Panel("Refused and failed, by kind", "reqps", {"{{kind}}": rate("request_failures_total", "kind")}),
        Panel("Answers under way", "short", {"{{gateway}}": f"sum by (gateway) ({gauge('num_requests_open')})"}),
    ],
    "Latency": [
        Panel("Time to the first token", "s", latencies("time_to_first_token_seconds")),
        Panel("Between two tokens", "s", latencies("inter_token_latency_seconds")),
        Panel("Waiting for a place at a router", "s", latencies("request_queue_time_seconds")),
        Panel("Whole answers", "s", latencies("e2e_request_latency_seconds")),
    ],
    "Routers": [
        Panel("KV cache in use", "percentunit", {"{{router}}": f"max by (router) ({gauge('kv_cache_usage_perc')})"}),
        Panel("Requests that run", "short", {"{{router}}": f"sum by (router) ({gauge('num_requests_running')})"}),
        Panel("Requests that wait", "short", {"{{router}}": f"sum by (router) ({gauge('num_requests_waiting')})"}),
        Panel("Mean step", "s", {"step": f"{rate('router_step_seconds_total')} / {rate('router_steps_total')}"}),
        Panel(
            "Computed twice",
            "short",
            {"preemptions": rate("num_preemptions_total"), "resubmissions": rate("request_resubmissions_total")},
            text="Sequences that gave their pages back, and answers that went on at another router.",
        ),
    ],
    "Expert hosts": [
        Panel("Busy", "percentunit", {"{{host}}": f"max by (host) ({gauge('host_busy_ratio')})"}),
        Panel("Mean wait of a frame", "s", {"{{host}}": f"max by (host) ({gauge('host_queue_wait_mean_seconds')})"}),
        Panel("Tokens a second", "short", {"{{host}}": f"sum by (host) ({gauge('host_tokens_per_second')})"}),
        Panel("Experts held", "short", {"{{host}}": f"max by (host) ({gauge('host_experts')})"}),
        Panel("Sent again, by reason", "short", {"{{reason}}": rate("dispatch_resends_total", "reason")}),
    ],
    "Placement": [
        Panel("Balancedness", "percentunit", {"now": gauge("balancedness"), "as planned": gauge("balancedness_planned")}),
        Panel(
            "Experts and replicas",
            "short",
            {"experts": gauge("placement_experts"), "ready": gauge("placement_experts_ready"), "replicas": gauge("placement_replicas")},
        ),
        Panel(
            "Moved", "short", {"replicas a minute": f"60 * {rate('placement_moves_total')}", "maps": rate("placement_maps_published_total")}
        ),
        Panel("Bytes moved", "Bps", {"to load": rate("placement_moved_bytes_total")}),
        Panel(
            "Maps that the slowest router is behind",
            "short",
            {"maps": f"max({gauge('placement_map_version')}) - min({gauge('router_map_version')})"},
        ),
    ],
    "Load of the experts": [
        Panel("Layer's tokens a second", "short", {"layer {{layer}}": rate("layer_tokens_total", "layer")}),
        Panel(
            "Busiest expert of a layer / mean expert",
            "short",
            {
                "layer {{layer}}": f"{rate('layer_busiest_expert_tokens_total', 'layer')} / ({rate('layer_tokens_total', 'layer')}"
                f" / sum by (layer) ({gauge('layer_experts')}))"
            },
        ),
        Panel("Replicas of a layer", "short", {"layer {{layer}}": f"sum by (layer) ({gauge('layer_replicas')})"}),
        Panel(
            "Hottest experts",
            "short",
            {"layer {{layer}} expert {{expert}}": f"topk(10, {rate('expert_tokens_total', 'layer, expert')})"},
            text="Shown where the model has at most metrics.per_expert experts.",
        ),
    ],
    "What happened": [
        Panel("Members", "short", {"{{event}}": f"sum by (event) (increase(shoal_member_events_total{{{CHOSEN}}}[5m]))"}),
        Panel(
            "Scaling",
            "short",
            {
                "{{role}} {{direction}}, {{reason}}": "sum by (role, direction, reason) "
                f"(increase(shoal_scaling_decisions_total{{{CHOSEN}}}[5m]))"
            },
        ),
        Panel("Decisions", "short", {"{{kind}}": f"sum by (kind) (increase(shoal_decisions_total{{{CHOSEN}}}[5m]))"}),
    ],
}


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A menu of the values that a label has."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def drawn(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    """The panel as Grafana has it, at its place in the grid."""
    targets = [
        {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expr, "legendFormat": legend, "range": True}
        for place, (legend, expr) in enumerate(panel.queries.items())
    ]
    custom = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"} if panel.kind == "timeseries" else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT if panel.kind == "timeseries" else 4},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
        "targets": targets,
    }


def panels() -> list[dict[str, Any]]:
    """Row by row, numbered from 1."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, columns in ROWS.items():
        made.append({"id": len(made) + 1, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": []})
        y += 1
        width = WIDTH // len(columns)
        for column, panel in enumerate(columns):
            made.append(drawn(panel, len(made) + 1, column * width, y, width))
        y += HEIGHT
    return made


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "uid": "shoal",
        "title": "Shoal",
        "tags": ["shoal"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                variable("namespace", "Namespace", "label_values(shoal_members, namespace)"),
                variable("ray_cluster", "Ray cluster", 'label_values(shoal_members{namespace=~"$namespace"}, ray_cluster)'),
                variable("model", "Model", 'label_values(shoal_members{namespace=~"$namespace"}, model_name)'),
            ]
        },
        "panels": panels(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
