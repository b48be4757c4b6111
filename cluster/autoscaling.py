"""How many replicas a role needs: pure functions of what its replicas report, with the clock passed in.

Serve's controller (`cluster.autoscaling_serve`) and simulations call the same `decide`. Words: a **signal** is one reading
against its target, told as the replicas that would bring it there; the **need** is the largest signal; what has no reading is
no information, never zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, isfinite
from typing import Any, Self

NUM_BUCKETS = 8  # of the cool-down, for which the largest need is remembered


@dataclass(frozen=True)
class Signal:
    """`need`: replicas that would bring the reading to its target, not rounded."""

    name: str
    need: float
    reading: str


@dataclass(frozen=True)
class Bounds:
    """`floor` is what must run whatever the load: for hosts, where all experts fit, and one more."""

    min: int
    max: int
    floor: int = 0


@dataclass(frozen=True)
class Fleet:
    """Replicas asked for, running (as Serve counts them), and those of the running that have reported."""

    target: int
    running: int
    reporting: int


@dataclass(frozen=True)
class Pace:
    """A need above the target must last `reaction_s`; the target falls to the largest need, plus `headroom` as a share, of `cooldown_s`.

    Needs within `tolerance`, a share of the target, change nothing upwards.
    """

    reaction_s: float = 1.0
    cooldown_s: float = 60.0
    headroom: float = 0.1
    tolerance: float = 0.1


class Limit(StrEnum):
    """What keeps a decision from what it wants."""

    MAX = "max"
    FLOOR_ABOVE_MAX = "floor_above_max"


@dataclass(frozen=True)
class History:
    """What one decision leaves for the next. `peaks`: (start of the bucket, largest need in it), oldest first."""

    watched_since_s: float | None = None
    above_since_s: float | None = None
    peaks: tuple[tuple[float, int], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-serializable; Serve keeps it between two calls."""
        return {"watched_since_s": self.watched_since_s, "above_since_s": self.above_since_s, "peaks": [list(peak) for peak in self.peaks]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """The reverse of `as_dict`; an empty one begins anew."""
        peaks = tuple((float(start_s), int(need)) for start_s, need in state.get("peaks", ()))
        return cls(state.get("watched_since_s"), state.get("above_since_s"), peaks)


@dataclass(frozen=True)
class Decision:
    """`wanted` is what the signals and the floor ask for now, `replicas` what pace and bounds make of it.

    `limit` names the bound that keeps it from what is wanted; `cause` the signal or the bound that set the number, in a word.
    """

    replicas: int
    wanted: int
    limit: Limit | None
    reason: str
    history: History
    cause: str = ""


def decide(signals: Sequence[Signal], fleet: Fleet, bounds: Bounds, pace: Pace, history: History, now_s: float) -> Decision:
    """The replicas to ask for now. Never below bounds.min, never above bounds.max; the floor gives way to max and says so.

    While a running replica has not reported, nothing is taken away: it may be the one that carries the load.
    """
    strongest = max(signals, key=lambda signal: signal.need, default=None)
    need = strongest.need if strongest else 0.0
    complete = bool(signals) and fleet.reporting >= fleet.running
    up = ceil(need) if need > fleet.target * (1 + pace.tolerance) else min(ceil(need), fleet.target)
    down = ceil(need * (1 + pace.headroom))
    peaks = _remember(history.peaks, down if complete else max(down, fleet.target), pace.cooldown_s, now_s)
    watched_since_s = now_s if history.watched_since_s is None else min(history.watched_since_s, now_s)
    above_since_s = (history.above_since_s if history.above_since_s is not None else now_s) if up > fleet.target else None

    paced = fleet.target
    if above_since_s is not None and now_s - above_since_s >= pace.reaction_s:
        paced, above_since_s = up, None
    elif above_since_s is None and now_s - watched_since_s >= pace.cooldown_s:
        paced = min(fleet.target, max(peak for _, peak in peaks))

    lower, limit = max(bounds.min, bounds.floor), None
    if lower > bounds.max:
        limit = Limit.FLOOR_ABOVE_MAX
    elif up > bounds.max:  # told at once, not after the reaction time
        limit = Limit.MAX
    wanted, replicas = max(up, lower), min(max(paced, lower), bounds.max)
    reason = _reason(strongest, fleet, bounds, replicas, wanted, limit, complete)
    cause = _cause(strongest, paced, replicas, bounds)
    return Decision(replicas, wanted, limit, reason, History(watched_since_s, above_since_s, peaks), cause)


def _cause(strongest: Signal | None, paced: int, replicas: int, bounds: Bounds) -> str:
    """What set the number: the bound that changed what load and pace would have, or else the strongest signal."""
    if replicas > paced:
        return "floor" if bounds.floor > bounds.min else "min_replicas"
    if replicas < paced:
        return "max_replicas"
    return strongest.name.replace(" ", "_") if strongest is not None else "no_signal"


def _remember(peaks: tuple[tuple[float, int], ...], need: int, cooldown_s: float, now_s: float) -> tuple[tuple[float, int], ...]:
    """Buckets of a part of the cool-down; one is dropped only when all of it is older than the cool-down."""
    width_s = cooldown_s / NUM_BUCKETS
    kept = tuple(peak for peak in peaks if now_s - width_s - cooldown_s <= peak[0] <= now_s)
    if kept and now_s - kept[-1][0] < width_s:
        return (*kept[:-1], (kept[-1][0], max(kept[-1][1], need)))
    return (*kept, (now_s, need))


def _reason(strongest: Signal | None, fleet: Fleet, bounds: Bounds, replicas: int, wanted: int, limit: Limit | None, complete: bool) -> str:
    """One readable line: why this number."""
    if strongest is None:
        why = "no replica has reported yet"
    else:
        why = f"{strongest.name} {strongest.reading} needs {strongest.need:.2f}"
        if not complete:
            why += f", {fleet.running - fleet.reporting} of {fleet.running} have not reported"
    if bounds.floor > bounds.min:
        why += f", floor {bounds.floor}"
    if limit is Limit.FLOOR_ABOVE_MAX:
        return f"{why}: {max(bounds.min, bounds.floor)} must run whatever the load, but max is {bounds.max}"
    if limit is Limit.MAX:
        return f"{why}: wants {wanted}, but max is {bounds.max}"
    change = "stay at" if replicas == fleet.target else f"{fleet.target} ->"
    return f"{why}: {change} {replicas}"


@dataclass(frozen=True)
class HostLoad:
    """One host over the last interval: share of the time it computed, mean wait of a frame in seconds, and what it can hold."""

    busy: float
    queue_wait_s: float | None = None
    slots: float | None = None  # experts over all layers, bytes taken into account; None: no limit
    is_serving: bool = True


@dataclass(frozen=True)
class HostTargets:
    """`max_growth`: a queue says that hosts are too few, not by how many; it asks for at most this many times those that serve."""

    busy: float = 0.6
    queue_wait_s: float = 0.05
    max_growth: float = 2.0


@dataclass(frozen=True)
class RouterLoad:
    """One router: shares of KV pages in use and of the time in a step, prompt tokens and requests that wait for a place."""

    kv_use: float | None = None
    waiting_tokens: float | None = None
    num_waiting: float | None = None
    busy: float | None = None


@dataclass(frozen=True)
class RouterTargets:
    """`num_waiting` counts where a router does not tell its waiting tokens; `max_growth` as in HostTargets."""

    kv_use: float = 0.7
    waiting_tokens: float = 4096.0
    num_waiting: float = 4.0
    busy: float = 0.7
    max_growth: float = 2.0


def host_signals(loads: Sequence[HostLoad], targets: HostTargets) -> tuple[Signal, ...]:
    """Expert load: the busy time of all hosts, and how long frames wait where they serve."""
    if not loads:
        return ()
    signals = [_of_share("busy", [load.busy for load in loads], targets.busy)]
    waits = [load.queue_wait_s for load in loads if load.is_serving and load.queue_wait_s is not None]
    if waits:
        signals.append(_of_queue("queue wait", sum(waits) / len(waits), targets.queue_wait_s, len(waits), targets.max_growth, "s"))
    return tuple(signals)


def router_signals(loads: Sequence[RouterLoad], targets: RouterTargets) -> tuple[Signal, ...]:
    """KV-cache use and busy time as shares; waiting tokens, or waiting requests where tokens are not told, as a queue."""
    signals = []
    for name, target in (("kv_use", targets.kv_use), ("busy", targets.busy)):
        shares = [share for load in loads if (share := getattr(load, name)) is not None]
        if shares:
            signals.append(_of_share(name, shares, target))
    for name, target in (("waiting_tokens", targets.waiting_tokens), ("num_waiting", targets.num_waiting)):
        queued = [count for load in loads if (count := getattr(load, name)) is not None]
        if queued:
            signals.append(_of_queue(name, sum(queued) / len(queued), target, len(queued), targets.max_growth, ""))
            break
    return tuple(signals)


def gateway_signals(num_ongoing: float, target: float) -> tuple[Signal, ...]:
    """Open requests of all gateways against a target for one."""
    return (Signal("ongoing requests", num_ongoing / target, f"{num_ongoing:.0f} of {target:.0f} each"),)


def host_floor(num_experts: int, min_replicas: int, slots: Sequence[float | None]) -> int:
    """Hosts on which all experts x min replicas fit, no two replicas on one, and one host more; 0 where there is no expert.

    Which hosts Serve will stop is not known: all count as the smallest. None is a host without a limit.
    """
    if num_experts == 0:
        return 0
    smallest = min((count for count in slots if count is not None), default=None)
    fit = 1 if smallest is None else ceil(num_experts * min_replicas / max(1.0, smallest))
    return max(fit, min_replicas) + 1


def effective_bounds(configured: Bounds, told: Sequence[Mapping[str, float]], hard: Bounds) -> Bounds:
    """Configured bounds, or those set at run time as the replicas pass them on, within Serve's own (`hard`).

    `told`: each replica's `scaling_min`, `scaling_max`, `scaling_floor` and `scaling_version`; the highest version counts,
    because replicas learn of a change one after another.
    """
    newest = max(told, key=lambda orders: orders.get("scaling_version", 0.0), default={})
    upper = min(int(newest.get("scaling_max", configured.max)), hard.max)
    lower = max(int(newest.get("scaling_min", configured.min)), hard.min)
    floor = max([configured.floor, *(int(orders.get("scaling_floor", 0.0)) for orders in told)])
    return Bounds(min(lower, upper), upper, floor)


def _of_share(name: str, shares: Sequence[float], target: float) -> Signal:
    """The sum of the shares is the work: spread over `need` replicas, each has `target`."""
    return Signal(name, sum(shares) / target, f"{sum(shares) / len(shares):.2f} of {target:.2f}")


def _of_queue(name: str, mean: float, target: float, num_replicas: int, max_growth: float, unit: str) -> Signal:
    ratio = mean / target if isfinite(mean) else max_growth
    return Signal(name, num_replicas * min(ratio, max_growth), f"{mean:.3g}{unit} of {target:.3g}{unit}")
