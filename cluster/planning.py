"""When to plan and what comes of it: the desired placement, with the reason for every change of it."""

from collections.abc import Mapping, Sequence

from cluster.coordinator_limits import CoordinatorLimits
from cluster.decisions import DecisionLog
from cluster.desired_placement import Placement, StoredHost, capacities, expert_bytes, mended, taken_up, uncovered
from cluster.errors import ClusterError
from cluster.load_window import sampling_errors
from cluster.members import Members
from cluster.operations import Operation, Operations
from cluster.placement import NotEnoughSlots, Plan, plan
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey

Loads = Mapping[LogicalExpert, float]


class NotEnoughReplicas(ClusterError):
    """The hosts left could not hold min_replicas of every expert."""

    kind = "not_enough_replicas"

    def __init__(self, num_experts: int, min_replicas: int) -> None:
        super().__init__(f"{num_experts} experts would have fewer than {min_replicas} replicas (placement.min_replicas) on the hosts left")


class Planning:
    """`desired` is what each host should hold. Times are seconds on the Coordinator's clock."""

    def __init__(
        self,
        experts: Sequence[LogicalExpert],
        limits: CoordinatorLimits,
        members: Members,
        operations: Operations,
        log: DecisionLog,
        now_s: float,
    ) -> None:
        self._experts = experts
        self._limits = limits
        self._members = members
        self._operations = operations
        self._log = log
        self.desired: Placement = {}
        self.drained: set[HostKey] = set()  # by an operator: they get nothing for as long as they live
        self.stored_hosts: tuple[StoredHost, ...] = ()
        self.last_plan: Plan | None = None
        self.failure: str | None = None
        self.has_begun = False
        self._reasons: list[str] = []  # why to plan anew
        self._leaving: frozenset[HostKey] = frozenset()
        self._replacement_by_s: float | None = None  # until then a lost host's replacement is waited for
        self._started_s = self.planned_s = now_s

    # -- when

    def ask(self, reason: str) -> None:
        """There is a reason to plan anew."""
        self._reasons.append(reason)

    def host_joined(self, key: HostKey) -> None:
        """Plans for the newcomer, which may be the replacement that is waited for."""
        self._replacement_by_s = None
        self.ask(f"host {key.replica_id} joined")

    def host_lost(self, key: HostKey, now_s: float, *, was_leaving: bool) -> None:
        """Waits for a replacement, unless none is to be expected."""
        if was_leaving or not self.desired.get(key):
            self.ask(f"host {key.replica_id} has left")
        else:
            self._replacement_by_s = now_s + self._limits.orphan_grace_s

    def is_due(self, now_s: float) -> bool:
        """Whether to plan now; the first time, whether all that are expected are there."""
        if not self.has_begun:
            return self._may_begin(now_s)
        leaving = frozenset(key for key, member in self._members.hosts.items() if member.report.is_leaving)
        for key in leaving - self._leaving:
            self.ask(f"host {key.replica_id} is leaving")
        self._leaving = leaving
        if self._replacement_by_s is not None and now_s >= self._replacement_by_s:
            self._replacement_by_s = None
            self.ask(f"no replacement came within {self._limits.orphan_grace_s:.0f} s")
        is_quiet = not self._reasons and self._replacement_by_s is None
        if is_quiet and now_s - self.planned_s >= self._limits.rebalance_interval_s and self.is_converged():
            self.ask("a look at the balance")
        return bool(self._reasons or self._asked_for("drain") or self._asked_for("rebalance"))

    def _may_begin(self, now_s: float) -> bool:
        """At a first start hosts may still be on their way, and nobody waits; where streams run, only for the grace."""
        if len(self._members.hosts) >= self._limits.num_hosts:
            return True
        is_serving = any(member.report.adopted for member in self._members.routers.values())
        return is_serving and bool(self._members.hosts) and now_s - self._started_s > self._limits.orphan_grace_s

    def is_converged(self) -> bool:
        """Whether every host holds what it should, no more and no less."""
        return all(member.ready == self.desired.get(key, member.ready) for key, member in self._members.hosts.items())

    def is_ready(self) -> bool:
        """Whether every host holds at least what it should."""
        return all(member.ready >= self.desired.get(key, frozenset()) for key, member in self._members.hosts.items())

    # -- what

    def replan(self, loads: Loads, now_s: float) -> None:
        """One plan for all that is asked: drains, departures, newcomers, an operator's rebalance."""
        reasons, self._reasons = self._reasons, []
        self.planned_s = now_s
        if not self.has_begun:
            self.has_begun = True
            if self._takes_up():
                return
        drains, rebalances = self._asked_for("drain"), self._asked_for("rebalance")
        is_forced = bool(rebalances)
        new = {key for key in self._members.hosts if key.replica_id in {operation.target for operation in drains}}
        self.drained &= set(self._members.hosts)
        try:
            planned = self._plan(loads, frozenset(), is_forced=is_forced)
        except NotEnoughSlots as error:
            for operation in (*drains, *rebalances):
                self._operations.end(operation, "rolled_back", f"cannot plan: {error}")
            self.failure = str(error)
            self._log.tell_once("plan", f"cannot plan ({_joined(reasons)}): {error}")
            return
        if new:
            try:
                planned = self._plan_drained(loads, new, planned, is_forced=is_forced)
            except (NotEnoughSlots, NotEnoughReplicas) as error:
                for operation in drains:
                    self._operations.end(operation, "rolled_back", f"the host stays as it is: {error}")
                drains = []
            else:
                self.drained |= new
        for operation in (*drains, *rebalances):
            self._operations.move(operation.id, "running", f"{len(planned.moves)} replicas to load")
        self._adopt(planned, [*reasons, *(operation.id for operation in (*drains, *rebalances))])

    def rescue(self, loads: Loads, now_s: float) -> bool:
        """Experts that no reachable host holds or is to hold go onto those that there are, at once: requests wait for them.

        That a router cannot reach a host is enough to load elsewhere, never to take the host out of the map: it may be well.
        """
        hosts = self._members.hosts
        suspected = self._members.suspected_for(now_s)
        unreachable = self._members.dead | {key for key, since_s in suspected.items() if since_s >= self._limits.rescue_grace_s}
        trusted = {key: hosts[key] for key in hosts if key not in unreachable}
        holding = {key: member.ready | self.desired.get(key, frozenset()) for key, member in trusted.items()}
        missing = uncovered(self._experts, holding)
        able = {key: member for key, member in trusted.items() if key not in self.drained and not member.report.is_leaving}
        if not missing or not able:
            return False
        first = f"{len(missing)} experts (layer {missing[0].layer} expert {missing[0].expert} first) have no host that can be reached"
        try:
            self.desired = mended(missing, self.desired, capacities(able), loads, expert_bytes(hosts))
        except NotEnoughSlots as error:
            self._log.tell_once("rescue", f"{first}, and the others have no room: {error}")
            return False
        self._log.tell("rescue", f"{first}: {len(able)} others load them", num_experts=len(missing))
        return True

    def give_up_drain(self, target: str) -> None:
        """The host takes part again, with what it still holds."""
        self.give_up_moves()
        self.drained = {key for key in self.drained if key.replica_id != target}
        self.ask(f"the drain of host {target} was given up")

    def give_up_moves(self) -> None:
        """What hosts hold by now is what they should hold."""
        self.desired = {key: member.ready for key, member in self._members.hosts.items()}

    def _asked_for(self, kind: str) -> list[Operation]:
        return [operation for operation in self._operations.open() if operation.kind == kind and operation.state == "pending"]

    def _plan(self, loads: Loads, new: frozenset[HostKey], *, is_forced: bool) -> Plan:
        hosts = self._members.hosts
        present = {key: self.desired.get(key, member.ready) for key, member in hosts.items()}
        draining = new | self.drained | {key for key, member in hosts.items() if member.report.is_leaving}
        num_bytes = expert_bytes(hosts)
        noise = sampling_errors(loads, len(hosts), self._limits.long_window_s, self.planned_s - self._started_s)
        return plan(self._experts, capacities(hosts), present, loads, num_bytes, self._limits.planner, draining, is_forced, noise)

    def _plan_drained(self, loads: Loads, new: set[HostKey], without: Plan, *, is_forced: bool) -> Plan:
        planned = self._plan(loads, frozenset(new), is_forced=is_forced)
        if planned.missing_replicas > without.missing_replicas:
            raise NotEnoughReplicas(planned.missing_replicas, self._limits.planner.min_replicas)
        return planned

    def _adopt(self, planned: Plan, reasons: list[str]) -> None:
        has_changed = planned.desired != {key: self.desired[key] for key in self._members.hosts if key in self.desired}
        self.desired, self.last_plan, self.failure = dict(planned.desired), planned, None
        num_bytes = sum(move.num_bytes for move in planned.moves)
        numbers = {
            "num_moves": len(planned.moves),
            "num_bytes": num_bytes,
            "balancedness_before": round(planned.balancedness_before, 4),
            "balancedness": round(planned.balancedness, 4),
            "missing_replicas": planned.missing_replicas,
        }
        if has_changed:
            text = f"planned ({_joined(reasons)}): {len(planned.moves)} replicas to load, {num_bytes / 2**20:.1f} MiB; {planned.reason}"
            self._log.tell("plan", text, **numbers)
        else:
            self._log.tell_once("stay", f"nothing moves ({_joined(reasons)}): {planned.reason}", **numbers)

    def _takes_up(self) -> bool:
        """What an earlier Coordinator wanted, from the store or else from what hosts hold, if that leaves no expert out."""
        hosts = self._members.hosts
        stored = taken_up(self.stored_hosts, hosts) if self.stored_hosts else {}
        present = stored or {key: member.ready for key, member in hosts.items()}
        is_within = all(member.report.slots is None or len(present.get(key, ())) <= member.report.slots for key, member in hosts.items())
        is_whole = all(present.get(key) or key in self.drained for key in hosts) and not uncovered(self._experts, present)
        is_leaving = any(member.report.is_leaving for member in hosts.values())
        if stored or (is_whole and is_within and not is_leaving):
            self.desired = {key: present.get(key, frozenset()) for key in hosts}
        if not is_whole or not is_within or is_leaving:
            return False
        source = "the state store" if stored else "what hosts report"
        num_replicas = sum(map(len, self.desired.values()))
        self._log.tell("plan", f"taken up from {source}: {num_replicas} replicas on {len(hosts)} hosts", num_moves=0, num_bytes=0)
        return True


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reasons)) or "all hosts are there"
