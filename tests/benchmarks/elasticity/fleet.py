"""One replay: routers and hosts that are fixed, that follow their own policies, or that grow and shrink as one unit."""

from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from cluster.autoscaling import (
    Bounds,
    Decision,
    Fleet,
    History,
    HostLoad,
    HostTargets,
    Pace,
    RouterLoad,
    RouterTargets,
    Signal,
    decide,
    host_floor,
    host_signals,
    router_signals,
)
from tests.benchmarks.elasticity.constants import Constants
from tests.benchmarks.elasticity.hosts import ExpertHosts
from tests.benchmarks.elasticity.requests import Requests
from tests.benchmarks.elasticity.routers import (
    ACCEPTS,
    END,
    HEAD,
    HOST_WORK,
    KV,
    PENDING,
    RUNNING,
    STEPS,
    WAIT,
    Costs,
    State,
    advance,
    new_state,
)

FIXED_INTERVAL_S = 60.0  # nothing is decided in a fixed fleet; the hour's turn of topic is seen
DRAINING = 16  # rows for routers that drain beside those that serve
LATE_SHARE = 0.01  # the targets are for 99 of 100 requests


@dataclass(frozen=True)
class Shape:
    """Bounds of both roles; `unit` (routers, hosts) scales them together in that ratio, None each by its own policy."""

    routers: Bounds
    hosts: Bounds
    unit: tuple[int, int] | None = None

    @property
    def is_fixed(self) -> bool:
        return self.routers.min == self.routers.max and self.hosts.min == self.hosts.max


@dataclass(frozen=True)
class Outcome:
    """Percentiles in seconds over all requests; hours of nodes paid for; counts at every control interval."""

    ttft_p99_s: float
    tpot_p99_s: float
    num_served: int
    num_requests: int
    router_hours: float
    host_hours: float
    is_met: bool
    counts: NDArray[np.float64] = field(
        repr=False
    )  # [intervals, 5]: time, routers paid, hosts paid, routers that take requests, hosts ready

    @property
    def hours(self) -> float:
        return self.router_hours + self.host_hours


@dataclass
class _Role:
    """Nodes of one role: those that start (when they will be ready), those that serve, those that leave, those not yet released."""

    target: int
    serving: int
    starting_s: list[float] = field(default_factory=list)
    leaving_s: list[float] = field(default_factory=list)
    released_s: list[float] = field(default_factory=list)
    history: History = field(default_factory=History)

    def paid(self, now_s: float) -> int:
        self.released_s = [at_s for at_s in self.released_s if at_s > now_s]
        return self.serving + len(self.starting_s) + len(self.leaving_s) + len(self.released_s)


def router_costs(constants: Constants) -> Costs:
    """Seconds of a router's step from the model's shape and the device's rates."""
    model, device, engine = constants.model, constants.device, constants.engine
    return Costs(
        step_s=model.num_layers * device.hop_s,
        weights_s=model.dense_bytes / device.bytes_per_s,
        token_s=model.dense_flop_per_token / device.flop_per_s,
        pair_s=model.attention_flop_per_pair / device.flop_per_s,
        context_s=model.kv_bytes_per_token / device.bytes_per_s,
        front_s=engine.front_s,
        max_batch_tokens=engine.max_batch_tokens,
        kv_capacity=(device.memory_bytes - model.dense_bytes) // model.kv_bytes_per_token,
        ttft_s=constants.targets.ttft_s,
        tpot_s=constants.targets.tpot_s,
    )


class Replay:
    """Plays `requests` on a fleet of `shape`. `run` may be called once."""

    def __init__(self, constants: Constants, hosts: ExpertHosts, requests: Requests, shape: Shape) -> None:
        self._constants, self._hosts, self._requests, self._shape = constants, hosts, requests, shape
        self._costs = router_costs(constants)
        num_rows = shape.routers.max + (0 if shape.is_fixed else DRAINING)
        self._state: State = new_state(num_rows, len(requests.arrival_s), constants.engine.max_running)
        policy = constants.policy
        self._pace = Pace(policy.reaction_s, policy.cooldown_s, policy.headroom, policy.tolerance)
        self._host_targets = HostTargets(policy.host_busy, policy.host_queue_wait_s, policy.max_growth)
        self._router_targets = RouterTargets(
            kv_use=policy.router_kv_use, waiting_tokens=policy.router_waiting_tokens, busy=policy.router_busy, max_growth=policy.max_growth
        )
        floor = host_floor(hosts.num_experts, constants.placement.min_replicas, [float(hosts.slots)])
        self._host_bounds = Bounds(shape.hosts.min, shape.hosts.max, floor)
        hosts_at_start = min(max(shape.hosts.min, floor), shape.hosts.max)
        self._routers = _Role(shape.routers.min, shape.routers.min)
        self._host_role = _Role(hosts_at_start, hosts_at_start)
        self._state.now[: shape.routers.min, ACCEPTS] = 1

    def run(self, whole: bool = True) -> Outcome:
        """To the end of the span, and on until every request has its answer (those minutes are not paid for).

        Not `whole`: ends as soon as more requests are late than the targets allow, with what there is.
        """
        requests, interval_s = self._requests, self._constants.policy.control_s
        if self._shape.is_fixed:
            interval_s = FIXED_INTERVAL_S
        position, now_s, counts = 0, 0.0, []
        allowed = LATE_SHARE * len(requests.arrival_s), LATE_SHARE * int((requests.answer > 1).sum())
        while now_s < requests.span_s:
            self._mature(now_s)
            counts.append((now_s, self._routers.paid(now_s), self._host_role.paid(now_s), self._routers.serving, self._host_role.serving))
            position = self._advance(now_s + interval_s, now_s, position)
            now_s += interval_s
            if not whole and (self._state.late > allowed).any():
                break
            if not self._shape.is_fixed:
                self._scale(now_s, interval_s)
        else:
            self._advance(now_s + 3600.0, now_s, position)
        return self._outcome(np.array(counts, dtype=np.float64), interval_s, bool((self._state.late <= allowed).all()))

    def _advance(self, until_s: float, now_s: float, position: int) -> int:
        planned_for, topic = self._topics(now_s)
        cost = self._hosts.cost(self._host_role.serving, planned_for, topic)
        requests = self._requests
        return advance(
            until_s, position, self._state, requests.arrival_s, requests.prompt, requests.answer, cost.busiest_s, cost.mean_s, self._costs
        )

    def _topics(self, now_s: float) -> tuple[str, str]:
        """For which topic the plan was made, and what comes: the plan follows the turn after a while."""
        turn_s = self._requests.span_s / 2
        topic = "law" if now_s < turn_s else "translation"
        return ("law" if now_s < turn_s + self._constants.placement.replan_s else "translation"), topic

    def _mature(self, now_s: float) -> None:
        """Nodes whose time has come begin to serve, or are released."""
        cluster, now = self._constants.cluster, self._state.now
        for role in (self._routers, self._host_role):
            ready = [at_s for at_s in role.starting_s if at_s <= now_s]
            role.starting_s = [at_s for at_s in role.starting_s if at_s > now_s]
            role.serving += len(ready)
            gone = [at_s for at_s in role.leaving_s if at_s <= now_s]
            role.leaving_s = [at_s for at_s in role.leaving_s if at_s > now_s]
            role.released_s += [at_s + cluster.release_s for at_s in gone]
        # A router that drains is paid for until it is empty, which its leaving time (inf) is set by here.
        is_empty = (now[:, ACCEPTS] == 0) & (now[:, END] == np.inf) & (now[:, HEAD] < 0)
        num_draining = int(((now[:, ACCEPTS] == 0) & ~is_empty).sum())
        while len(self._routers.leaving_s) > num_draining:
            self._routers.leaving_s.pop()
            self._routers.released_s.append(now_s + cluster.release_s)
        closed = np.flatnonzero(is_empty)
        missing = self._routers.serving - int(now[:, ACCEPTS].sum())
        if missing > 0:
            now[closed[:missing], ACCEPTS] = 1

    def _scale(self, now_s: float, interval_s: float) -> None:
        """The product's policies on what this interval showed; then nodes are asked for or given back."""
        router_signal, host_signal = self._signals(interval_s)
        self._state.busy_s[:] = 0
        self._state.sums[:] = 0
        unit = self._shape.unit
        if unit is None:
            routers = self._decide(self._routers, router_signal, self._shape.routers, now_s)
            hosts = self._decide(self._host_role, host_signal, self._host_bounds, now_s)
            self._ask(now_s, routers.replicas, hosts.replicas)
            return
        # One unit is a number of both: its need is that of whichever role needs more units.
        signals = [Signal(s.name, s.need / unit[0], s.reading) for s in router_signal]
        signals += [Signal(s.name, s.need / unit[1], s.reading) for s in host_signal]
        as_units = _Role(self._routers.target // unit[0], self._routers.serving // unit[0], history=self._routers.history)
        bounds = Bounds(
            max(ceil(self._shape.routers.min / unit[0]), ceil(self._host_bounds.min / unit[1])),
            min(self._shape.routers.max // unit[0], self._shape.hosts.max // unit[1]),
            ceil(self._host_bounds.floor / unit[1]),
        )
        decision = self._decide(as_units, tuple(signals), bounds, now_s)
        self._routers.history = decision.history
        self._ask(now_s, decision.replicas * unit[0], decision.replicas * unit[1])

    def _decide(self, role: _Role, signals: tuple[Signal, ...], bounds: Bounds, now_s: float) -> Decision:
        decision = decide(signals, Fleet(role.target, role.serving, role.serving), bounds, self._pace, role.history, now_s)
        role.history = decision.history
        return decision

    def _signals(self, interval_s: float) -> tuple[tuple[Signal, ...], tuple[Signal, ...]]:
        state, num_hosts = self._state, self._host_role.serving
        is_open = state.now[:, ACCEPTS] > 0
        kv_use = (state.now[is_open, KV] / self._costs.kv_capacity).tolist()
        busy = np.minimum(1.0, state.busy_s[is_open] / interval_s).tolist()
        routers = [RouterLoad(*load[:2], busy=load[2]) for load in zip(kv_use, state.now[is_open, PENDING].tolist(), busy, strict=True)]
        # Work is spread over hosts, so they are told apart only by what is not modelled: each shows the mean.
        frames = state.sums[STEPS] * self._constants.model.num_layers
        wait_s = state.sums[WAIT] / frames if frames else None
        host = HostLoad(min(1.0, state.sums[HOST_WORK] / interval_s), wait_s)
        return router_signals(routers, self._router_targets), host_signals([host] * num_hosts, self._host_targets)

    def _ask(self, now_s: float, num_routers: int, num_hosts: int) -> None:
        self._scale_routers(now_s, num_routers)
        self._scale_hosts(now_s, num_hosts)

    def _scale_routers(self, now_s: float, target: int) -> None:
        role, now, constants = self._routers, self._state.now, self._constants
        cluster = constants.cluster
        load_s = constants.model.dense_bytes / cluster.load_bytes_per_s
        role.starting_s += [now_s + cluster.node_start_s + cluster.replica_start_s + load_s] * (target - role.target)
        surplus = role.target - target
        role.target = target
        if surplus > 0:
            surplus -= _cancel(role, surplus, now_s, cluster.release_s)
            accepting = np.flatnonzero(now[:, ACCEPTS])
            emptiest = accepting[np.argsort(now[accepting, PENDING] + now[accepting, RUNNING], kind="stable")][:surplus]
            now[emptiest, ACCEPTS] = 0
            role.serving -= surplus
            role.leaving_s += [np.inf] * surplus

    def _scale_hosts(self, now_s: float, target: int) -> None:
        """A new host serves once the planner's share is loaded; one that goes stays until the others have loaded what it held."""
        role, cluster = self._host_role, self._constants.cluster
        planned_for, _ = self._topics(now_s)
        if target > role.target:
            load_s = self._hosts.change(role.serving, target, planned_for).most_bytes / cluster.load_bytes_per_s
            role.starting_s += [now_s + cluster.node_start_s + cluster.replica_start_s + load_s] * (target - role.target)
        surplus = role.target - target
        role.target = target
        if surplus > 0:
            surplus -= _cancel(role, surplus, now_s, cluster.release_s)
            drain_s = self._hosts.change(role.serving, role.serving - surplus, planned_for).most_bytes / cluster.load_bytes_per_s
            role.serving -= surplus
            role.leaving_s += [now_s + drain_s] * surplus

    def _outcome(self, counts: NDArray[np.float64], interval_s: float, in_time: bool) -> Outcome:
        state, requests = self._state, self._requests
        ttft_s = state.first_s - requests.arrival_s
        many = requests.answer > 1
        is_done = np.isfinite(state.done_s)
        tpot_s = np.full(len(ttft_s), np.inf)
        np.divide(state.done_s - np.where(is_done, state.first_s, 0.0), requests.answer - 1, out=tpot_s, where=many & is_done)
        hours = counts[:, 1:3].sum(axis=0) * interval_s / 3600
        return Outcome(
            ttft_p99_s=float(np.percentile(ttft_s, 99, method="higher")),
            tpot_p99_s=float(np.percentile(tpot_s[many], 99, method="higher")) if many.any() else 0.0,
            num_served=int(is_done.sum()),
            num_requests=len(ttft_s),
            router_hours=float(hours[0]),
            host_hours=float(hours[1]),
            is_met=in_time and bool(is_done.all()),
            counts=counts,
        )


def _cancel(role: _Role, surplus: int, now_s: float, release_s: float) -> int:
    """Nodes that still start are given back first; returns how many."""
    cancelled = min(surplus, len(role.starting_s))
    role.starting_s.sort()
    for _ in range(cancelled):
        role.starting_s.pop()
        role.released_s.append(now_s + release_s)
    return cancelled
