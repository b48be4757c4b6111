"""The Coordinator's view in parts, each small enough to look at: pure functions from plain values to plain values."""

from collections.abc import Callable, Mapping
from typing import Any

View = Mapping[str, Any]
NUM_DECISIONS = 32
NUM_STANDALONE = 16  # named on the status; /cluster/placement names them all


def placement_part(view: View) -> dict[str, Any]:
    """Where every expert stands, which stand alone, and the last decisions that led there."""
    return {
        **view["placement"],
        "epoch": view["epoch"],
        "num_experts": view["num_experts"],
        "standalone_experts": view["standalone_experts"],
        "drained_hosts": [host["id"] for host in view["hosts"] if host["is_drained"]],
        "decisions": view["decisions"][-NUM_DECISIONS:],
        "operations": view["operations"],
        "state_store": view["state_store"],
    }


def load_part(view: View) -> dict[str, Any]:
    """How busy everything is, and the bounds within which roles follow it."""
    return {**view["load"], "scaling": view["scaling"]}


def hosts_part(view: View) -> list[dict[str, Any]]:
    """The expert hosts."""
    return list(view["hosts"])


def status_part(view: View) -> dict[str, Any]:
    """What fits on a screen: everything but the tables that have a line for each expert. `share` is of the layer's load, 0 to 1."""
    by_expert = ("expert_tokens", "tokens_per_s", "routers")
    load = {name: value for name, value in view["load"].items() if name not in by_expert}
    layers = view["placement"]["layers"].values()
    return {
        "placement": {
            "version": view["placement"]["version"],
            "num_replicas": sum(len(hosts) for experts in layers for hosts in experts.values()),
            "num_standalone": len(view["standalone_experts"]),
            "standalone_experts": view["standalone_experts"][:NUM_STANDALONE],
        },
        "load": load | {"hottest": [_with_share(entry, view["load"]["tokens_per_s"]) for entry in load["hottest"]]},
        **{name: view[name] for name in ("epoch", "num_experts", "num_ready", "failure", "hosts", "routers", "scaling", "state_store")},
        "operations": view["operations"],
        "decisions": view["decisions"][-NUM_DECISIONS:],
    }


def whole(view: View) -> dict[str, Any]:
    """Everything that the Coordinator tells."""
    return dict(view)


PARTS: Mapping[str, Callable[[View], Any]] = {
    "placement": placement_part,
    "load": load_part,
    "hosts": hosts_part,
    "status": status_part,
}


def _with_share(entry: View, tokens_per_s: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Over the long window, which is the one that placement goes by."""
    layer = tokens_per_s.get(str(entry["layer"]), {})
    total = sum(layer.values())
    return {**entry, "share": round(layer.get(str(entry["expert"]), 0.0) / total, 4) if total > 0 else 0.0}
