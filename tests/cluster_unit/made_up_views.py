"""Views of Coordinators that never were, of any size: what the dashboard is shown in its quick tests."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STARTED_S = 1_790_000_000.0
BOUNDS_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


@dataclass
class MadeUpCluster:
    """`view(now_s)` after `now_s` seconds of steady traffic: a few experts of each layer are hot, and have more replicas."""

    num_layers: int = 27
    num_experts: int = 64
    num_hosts: int = 8
    seed: int = 7
    first_layer: int = 1
    tokens_per_s: float = 480.0
    with_latency: bool = True
    gone: set[str] = field(default_factory=set)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.hosts = sorted(f"{draw.randrange(36**8):08x}"[:8] for _ in range(self.num_hosts))
        self.rates, self.holders = {}, {}
        for layer in map(str, range(self.first_layer, self.first_layer + self.num_layers)):
            weights = [draw.lognormvariate(0, 0.75) for _ in range(self.num_experts)]
            scale = self.tokens_per_s * 6 / sum(weights)
            rates = [weight * scale for weight in weights]
            mean = sum(rates) / self.num_experts
            self.rates[layer] = {str(expert): round(rate, 3) for expert, rate in enumerate(rates)}
            replicas = [min(self.num_hosts, 4, max(1, round(rate / (1.5 * mean)))) for rate in rates]
            self.holders[layer] = {str(expert): sorted(draw.sample(self.hosts, number)) for expert, number in enumerate(replicas)}

    def tell(self, kind: str, text: str, time_unix_s: float) -> None:
        self.decisions.append({"n": len(self.decisions) + 1, "time_unix_s": time_unix_s, "kind": kind, "text": text})

    def view(self, now_s: float) -> dict[str, Any]:
        living = [host for host in self.hosts if host not in self.gone]
        wave = 1 + 0.2 * ((now_s // 7) % 3 - 1)
        layers = {
            layer: {expert: [host for host in hosts if host not in self.gone] for expert, hosts in experts.items()}
            for layer, experts in self.holders.items()
        }
        hosts = [self._host(host, layers, index, wave) for index, host in enumerate(living)]
        routers = [self._router(index, now_s) for index in range(2)]
        alone = [[int(layer), int(expert)] for layer, experts in layers.items() for expert, its in experts.items() if len(its) < 2]
        return {
            "placement": {"version": [3, 7 + len(self.gone)], "layers": layers},
            "epoch": 3,
            "hosts": hosts,
            "routers": routers,
            "load": {
                "expert_tokens": {},
                "tokens_per_s": self.rates,
                "balancedness": round(0.97 - 0.03 * abs(wave - 1) - 0.1 * len(self.gone), 4),
                "planned_balancedness": 0.991,
                "short_window_s": 5.0,
                "long_window_s": 60.0,
            },
            "standalone_experts": alone,
            "failure": None,
            "num_experts": self.num_layers * self.num_experts,
            "num_ready": self.num_layers * self.num_experts,
            "decisions": self.decisions,
            "operations": [],
            "scaling": {},
            "latency": self._latency(now_s) if self.with_latency else None,
        }

    def _host(self, name: str, layers: Mapping[str, Any], index: int, wave: float) -> dict[str, Any]:
        held = sum(name in hosts for experts in layers.values() for hosts in experts.values())
        slots = -(-held // 32) * 32 + 32
        shown = {"id": name, "incarnation": 1, "node_id": f"{index % 4:02d}f3a9c1e7", "ready": held, "desired": held, "published": held}
        shown |= {"loading": 0, "slots": slots, "expert_bytes": 17_301_504, "bytes_limit": None, "speed": 1.0, "is_leaving": False}
        shown |= {"is_drained": False, "suspected": False, "busy_share": 0.42 * wave, "wait_s": 0.0004}
        return shown | {"tokens_per_s": self.tokens_per_s * 6 * wave * (1 + index / 40) / max(1, self.num_hosts)}

    def _router(self, index: int, now_s: float) -> dict[str, Any]:
        shown = {"id": f"router{index}", "incarnation": 5, "node_id": "00f3a9c1e7", "map_version": [3, 7 + len(self.gone)], "suspects": []}
        shown |= {"num_running": 24.0 + index, "num_waiting": 1.0, "kv_use": 0.4 + 0.1 * index}
        return shown | {
            "num_generated_tokens": self.tokens_per_s / 2 * now_s,
            "num_prefill_tokens": 0.7 * self.tokens_per_s * (now_s + 40 * math.sin(now_s / 60)),
        }

    def _latency(self, now_s: float) -> dict[str, Any]:
        first = [0, 0, 1, 10, 30, 8, 2, 1, 0, 0]
        gap = [5, 60, 200, 30, 4, 1, 0, 0, 0, 0]
        return {
            name: {"bounds_s": BOUNDS_S, "counts": [int(now_s * count) for count in counts]}
            for name, counts in (("time_to_first_token", first), ("inter_token", gap))
        }
