"""The Coordinator's view as the dashboard's page takes it: a pure function from plain values to plain values.

The page polls it each second, so it is small: experts by position instead of by name, and what the page knows already left out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import DashboardSettings
from cluster.dashboard.events import events_after
from cluster.status import host_state

Values = Mapping[str, Any]
HOST_FIELDS = ("id", "incarnation", "node_id", "ready", "desired", "published", "loading", "slots", "expert_bytes", "bytes_limit")
LOAD_FIELDS = ("busy_share", "wait_s", "tokens_per_s")
ROUTER_COUNTS = ("num_running", "num_waiting", "kv_use", "num_generated_tokens", "num_prefill_tokens")


@dataclass(frozen=True)
class Known:
    """What a page has seen: the Coordinator's epoch, the map's version as "epoch.n" and the number of the last event.

    Another epoch is another Coordinator, whose events count from elsewhere: then the page is told everything anew.
    """

    epoch: int = 0
    map_version: str = ""
    event: int = 0


def dashboard_data(view: Values, settings: DashboardSettings, model: str, now_unix_s: float, known: Known) -> dict[str, Any]:
    """One poll's answer.

    `experts.tokens_per_s` [L, E] over `experts.window_s`, rows in the order of `experts.layers`. `placement.holders` [L, E] are
    lists of indices into `placement.hosts`; `placement` is None when the page has this map. `price_per_hour` is what all hosts and
    routers cost now, None where no price is configured. `latency`: see cluster.dashboard.latency; the page takes differences of polls.
    """
    version = view["placement"]["version"]
    map_version = "" if version is None else ".".join(str(part) for part in version)
    is_same = known.epoch == view["epoch"]
    layers = _layers(view)
    load = view["load"]
    return {
        "time_unix_s": round(now_unix_s, 3),
        "model": model,
        "epoch": view["epoch"],
        "map_version": map_version,
        "failure": view["failure"],
        "num_experts": view["num_experts"],
        "num_ready": view["num_ready"],
        "num_standalone": len(view["standalone_experts"]),
        "balancedness": load["balancedness"],
        "planned_balancedness": load["planned_balancedness"],
        "hosts": [_host(host) for host in view["hosts"]],
        "routers": [_router(router) for router in view["routers"]],
        "experts": _rates(layers, load),
        "placement": None if is_same and map_version == known.map_version else _placement(layers, view["placement"]["layers"]),
        "events": events_after(view["decisions"], known.event if is_same else 0),
        "operations": [_operation(operation) for operation in view["operations"] if operation["ended_unix_s"] is None],
        "latency": view.get("latency"),
        "price_per_hour": _price_per_hour(view, settings),
        "currency": settings.currency,
    }


def known_of(epoch: str | None, map_version: str | None, event: str | None) -> Known:
    """From the query of a poll; what makes no sense counts as not known, and the page is told everything."""
    if not all(re.fullmatch(r"\d{1,18}", text or "") for text in (epoch, event)):
        return Known()
    return Known(int(epoch or 0), map_version or "", int(event or 0))


def _layers(view: Values) -> list[tuple[str, int]]:
    """Each MoE layer with its number of experts, from everything that names one: loads come before the first map, and the other way."""
    sizes: dict[str, int] = {}
    for table in (view["placement"]["layers"], view["load"]["tokens_per_s"], view["load"]["expert_tokens"]):
        for layer, experts in table.items():
            sizes[layer] = max(sizes.get(layer, 0), 1 + max(map(int, experts), default=-1))
    return sorted(sizes.items(), key=lambda item: int(item[0]))


def _rates(layers: Sequence[tuple[str, int]], load: Values) -> dict[str, Any]:
    tables = [(load["tokens_per_s"].get(layer, {}), size) for layer, size in layers]
    return {
        "layers": [int(layer) for layer, _ in layers],
        "num_experts": max((size for _, size in layers), default=0),
        "tokens_per_s": [[_short(table.get(str(expert), 0.0)) for expert in range(size)] for table, size in tables],
        "window_s": load["long_window_s"],
    }


def _short(rate: float) -> float | int:
    """Three digits are more than a colour shows; thousands of numbers a second are sent."""
    return round(rate) if rate >= 100 else round(rate, 1) if rate >= 1 else round(rate, 3) or 0


def _placement(layers: Sequence[tuple[str, int]], holders: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Any]:
    hosts = sorted({host for experts in holders.values() for names in experts.values() for host in names})
    index = {host: position for position, host in enumerate(hosts)}
    rows = [[[index[host] for host in holders.get(layer, {}).get(str(expert), ())] for expert in range(size)] for layer, size in layers]
    return {"hosts": hosts, "holders": rows}


def _host(host: Values) -> dict[str, Any]:
    return {name: host.get(name) for name in (*HOST_FIELDS, *LOAD_FIELDS)} | {"state": host_state(host)}


def _router(router: Values) -> dict[str, Any]:
    version = router["map_version"]
    counts = {name: router.get(name, 0) for name in ROUTER_COUNTS}
    return {
        "id": router["id"],
        "incarnation": router["incarnation"],
        "node_id": router["node_id"],
        "map_version": "" if version is None else ".".join(str(part) for part in version),
        "suspects": router["suspects"],
    } | counts


def _operation(operation: Values) -> dict[str, Any]:
    return {name: operation[name] for name in ("id", "kind", "target", "state", "detail", "started_unix_s")}


def _price_per_hour(view: Values, settings: DashboardSettings) -> float | None:
    if settings.price_per_host_hour is None:
        return None
    per_router = settings.price_per_host_hour if settings.price_per_router_hour is None else settings.price_per_router_hour
    return round(len(view["hosts"]) * settings.price_per_host_hour + len(view["routers"]) * per_router, 6)
