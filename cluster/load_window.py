"""How much load there is of late: sums that decay, one short window and one long one.

A window of `window_s` forgets exponentially: what was counted t seconds ago weighs exp(-t / window_s), so that a steady rate is met
to 63 % after one window and to 95 % after three. The short one (5 s) is for status and repair, the long one (60 s) for placement.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from actors.exchange import HostReport
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

Name = TypeVar("Name", bound=Hashable)
MAX_GROWTH = 1e100  # then all sums are scaled back
FORGOTTEN = 1e-4  # per second: below this a name is dropped when sums are scaled back


class DecayingWindow(Generic[Name]):
    """Sums per name, all decaying by one clock. Nothing is touched as time goes by: later counts weigh more instead."""

    def __init__(self, window_s: float, started_s: float) -> None:
        self.window_s = window_s
        self._started_s = started_s
        self._scaled_s = started_s  # at this time a count weighs 1
        self._sums: dict[Name, float] = {}

    def add(self, counts: Mapping[Name, float], now_s: float) -> None:
        """Counts that came about just before `now_s`, in seconds on the caller's clock."""
        weight = self._weight(now_s)
        for name, count in counts.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * count

    def rates(self, now_s: float) -> dict[Name, float]:
        """Counts per second. Of a window that has run for less than its length, over the time that it has run."""
        covered_s = self.window_s * -math.expm1(-max(now_s - self._started_s, 0.0) / self.window_s)
        scale = self._weight(now_s) * max(covered_s, 1e-3 * self.window_s)
        return {name: total / scale for name, total in self._sums.items()}

    def restore(self, rates: Mapping[Name, float], now_s: float) -> None:
        """Begins with rates known from before, as if the window had run long."""
        self._started_s = -math.inf
        self._scaled_s = now_s
        self._sums = {name: rate * self.window_s for name, rate in rates.items()}

    def _weight(self, now_s: float) -> float:
        weight = math.exp(min((now_s - self._scaled_s) / self.window_s, 700.0))
        if weight > MAX_GROWTH:
            faint = FORGOTTEN * self.window_s
            self._sums = {name: total / weight for name, total in self._sums.items() if total / weight > faint}
            self._scaled_s, weight = now_s, 1.0
        return weight


def sampling_errors(rates: Mapping[LogicalExpert, float], num_hosts: int, window_s: float, age_s: float = math.inf) -> dict[int, float]:
    """By layer, how far a host's share of its load may be off by chance, as a share of it: gains in balance below this are noise.

    A host that was chosen n times is known to one standard error, 1 / sqrt(n), as counts of independent choices are (Poisson). A sum
    that decays counts for n = 2 x rate x window x tanh(age / 2 windows): its mean squared over its variance. Tokens of one text choose
    alike, so the true error is above this. Layers differ: of a prompt the last one's experts see one token.
    """
    of_layers: dict[int, float] = {}
    for expert, rate in rates.items():
        of_layers[expert.layer] = of_layers.get(expert.layer, 0.0) + rate
    counted_s = 2 * window_s * math.tanh(age_s / (2 * window_s))
    return {layer: math.sqrt(num_hosts / (rate * counted_s)) for layer, rate in of_layers.items() if rate * counted_s > 0}


class LoadWindows:
    """Tokens of experts, and of hosts what they did: the Coordinator's memory of load."""

    def __init__(self, short_s: float, long_s: float, now_s: float) -> None:
        self.experts_short = DecayingWindow[LogicalExpert](short_s, now_s)
        self.experts_long = DecayingWindow[LogicalExpert](long_s, now_s)
        self.hosts = DecayingWindow[tuple[HostKey, str]](short_s, now_s)
        self.num_tokens: dict[LogicalExpert, int] = {}

    def add_tokens(self, expert_tokens: Mapping[LogicalExpert, int], now_s: float) -> None:
        """Tokens that one router sent to each expert since its last report."""
        self.experts_short.add(expert_tokens, now_s)
        self.experts_long.add(expert_tokens, now_s)
        for expert, tokens in expert_tokens.items():
            self.num_tokens[expert] = self.num_tokens.get(expert, 0) + tokens

    def add_host(self, report: HostReport, now_s: float) -> None:
        """What a host did since its last report: `busy_s`, `queue_wait_s`, `num_frames`, `num_tokens` of its stats."""
        names = ("busy_s", "queue_wait_s", "num_frames", "num_tokens")
        self.hosts.add({(report.key, name): report.stats[name] for name in names if name in report.stats}, now_s)

    def host_load(self, key: HostKey, now_s: float) -> dict[str, float]:
        """`tokens_per_s`, `busy_share` of the time, and `wait_s`, a frame's mean time in the queue; over the short window."""
        return self.host_loads((key,), now_s)[key]

    def host_loads(self, keys: tuple[HostKey, ...], now_s: float) -> dict[HostKey, dict[str, float]]:
        """`host_load` of several."""
        rates = self.hosts.rates(now_s)
        loads = {}
        for key in keys:
            frames = rates.get((key, "num_frames"), 0.0)
            loads[key] = {
                "tokens_per_s": rates.get((key, "num_tokens"), 0.0),
                "busy_share": min(1.0, rates.get((key, "busy_s"), 0.0)),
                "wait_s": rates.get((key, "queue_wait_s"), 0.0) / frames if frames > 1e-9 else 0.0,
            }
        return loads


def balancedness(loads: Mapping[HostKey, float], speeds: Mapping[HostKey, float]) -> float | None:
    """Mean host load / busiest host load, each over what the host can carry; None without load."""
    times = [load / speeds.get(key, 1.0) for key, load in loads.items()]
    busiest = max(times, default=0.0)
    return sum(times) / len(times) / busiest if busiest > 0 else None
