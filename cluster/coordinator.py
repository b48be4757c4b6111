"""The control loop: who is alive, what each host should hold, and which map is published. Never on the token path."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.exchange import HostOrders, HostReport, Registry, RouterEntry, RouterOrders, RouterReport
from cluster.coordinator_limits import CoordinatorLimits
from cluster.coordinator_state import state_of, take_up
from cluster.coordinator_view import plain_view
from cluster.decisions import DecisionLog
from cluster.errors import ClusterError
from cluster.load_window import LoadWindows
from cluster.members import Members
from cluster.operation_progress import OperationProgress
from cluster.operations import Operation, Operations, UnknownHost
from cluster.planning import Planning
from cluster.published_maps import PublishedMaps, named_by
from cluster.run_time_bounds import RunTimeBounds
from cluster.saving import Saving
from cluster.state_store import StoredState
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey, PlacementMap


class Outranked(ClusterError):
    """Another Coordinator with a higher epoch is in charge: this one gives no orders any more."""

    kind = "coordinator_outranked"


class Coordinator:
    """Desired, ready, published: a map names ready replicas only, and a host keeps what any map in use names.

    One thread calls it. `clock` is monotonic, `wall_clock` counts from 1970, both in seconds. `stored` is what an earlier one left
    behind. `epoch` is raised above that, and until anything is planned above those of members; `salt` is added then, so that two
    who raise at once differ.
    """

    def __init__(
        self,
        experts: Sequence[LogicalExpert],
        limits: CoordinatorLimits,
        clock: Callable[[], float] = time.monotonic,
        epoch: int = 1,
        *,
        wall_clock: Callable[[], float] = time.time,
        salt: int = 0,
        stored: StoredState | None = None,
    ) -> None:
        now = clock()
        self.experts = experts
        self.limits = limits
        self.epoch = epoch
        self.is_outranked = False
        self.is_closing = False
        self.generation = 0  # grows whenever orders or the map may have changed
        self.log = DecisionLog(wall_clock)
        self.members = Members(limits.lease_s)
        self.loads = LoadWindows(limits.short_window_s, limits.long_window_s, now)
        self.bounds = RunTimeBounds(wall_clock)
        self.saving = Saving(clock, wall_clock, self.log)
        self.operations = Operations(wall_clock, f"{epoch:x}", self.log)
        self.planning = Planning(experts, limits, self.members, self.operations, self.log, now)
        self._progress = OperationProgress(self.operations, self.members, self.planning, self.bounds, limits.operation_timeout_s)
        self._clock = clock
        self._salt = salt
        self._observed_s = self._settles_from_s = now
        self._is_settled = False  # everybody who may remember a map has had a lease to say so
        self._is_stale = True  # something has changed since the map was last looked at
        self._published_s = -math.inf
        self._load_failure: str | None = None
        self._told_closing: set[HostKey] = set()
        self._begin_maps()
        if stored is not None:
            self.take_up(stored)

    # -- what members call

    def exchange_host(self, report: HostReport) -> HostOrders:
        """Takes a host's report, answers with what it should hold. Raises Outranked."""
        self.hear_host(report)
        return self.host_orders(report)

    def hear_host(self, report: HostReport) -> None:
        """Takes a host's report. Raises Outranked."""
        self._meet(report.epoch_seen)
        now = self._clock()
        self._notice_absence(now)
        known = self.members.hosts.get(report.key)
        if self.members.hear_host(report, now) is None:
            return
        self.loads.add_host(report, now)
        if known is None:
            self.log.tell("member", f"host {report.key.replica_id} joined", event="host_joined")
            self.planning.host_joined(report.key)
        elif _capacity(known.report) != _capacity(report):
            self.planning.ask(f"host {report.key.replica_id} reports another capacity")
        self._is_stale |= known is None or known.ready != report.ready or known.report.epoch_seen != report.epoch_seen
        self.observe()

    def host_orders(self, report: HostReport) -> HostOrders:
        """The orders in reply to the host's last report; what they let it drop counts as gone until it is reported again."""
        self._insist()
        member = self.members.hosts.get(report.key)
        if member is None or member.report.number != report.number:  # overtaken: nobody reads this answer
            return HostOrders(report.ready, report.ready, self.epoch)
        scaling = self.bounds.orders("expert_host", report.key)
        desired = self.planning.desired.get(report.key, member.ready)
        keep = desired | self.maps.kept(report.key, member.ready, self._in_use())
        member.ready &= keep
        if self.is_closing:
            self._told_closing.add(report.key)
            self.generation += 1
        return HostOrders(desired, keep, self.epoch, self._may_leave(report), scaling)

    def is_at_rest(self, report: HostReport) -> bool:
        """Whether the host has nothing to do now: its next orders can wait until something changes."""
        member = self.members.hosts.get(report.key)
        if member is None or member.report.number != report.number or report.epoch_seen != self.epoch:
            return False
        is_done = self.planning.desired.get(report.key) == member.ready
        return is_done and not report.is_leaving and not self.is_closing and not self.is_outranked

    def exchange_router(self, report: RouterReport) -> RouterOrders:
        """Takes a router's report, answers with the published map if the router has an older one. Raises Outranked."""
        self._meet(max([report.epoch_seen, *(version.epoch for version in (report.adopted, report.held) if version is not None)]))
        now = self._clock()
        self._notice_absence(now)
        known = self.members.routers.get(report.key)
        member = self.members.hear_router(report, now)
        if member is None:
            return RouterOrders(None, self.epoch)
        if known is None:
            self.log.tell("member", f"router {report.key.replica_id} joined", event="router_joined")
        self.loads.add_tokens(report.expert_tokens, now)
        self._is_stale |= known is None or _placement_news(known.report) != _placement_news(report)
        self.observe()
        scaling = self.bounds.orders("router", report.key)
        current, newest = self.maps.current, report.held or report.adopted
        if current is None or (newest is not None and newest >= current.version):
            return RouterOrders(None, self.epoch, self.is_closing, scaling)
        member.handed = current.version
        return RouterOrders(current, self.epoch, self.is_closing, scaling)

    # -- what gateways and people call

    def registry(self) -> Registry:
        """What gateways need: the live routers that can answer and stay, fullest report included."""
        self.observe()
        routers = tuple(
            RouterEntry(key, member.report.endpoint, member.report.stats)
            for key, member in self.members.routers.items()
            if member.report.adopted is not None and not member.report.is_leaving
        )
        progress = f"{len(self.members.hosts)} of {self.limits.num_hosts} hosts, {self.num_ready} of {len(self.experts)} experts ready"
        return Registry(routers, len(routers) >= self.limits.num_routers, self.failure, progress, self.bounds.orders("gateway"))

    def view(self) -> dict[str, Any]:
        """Placement, load, hosts, decisions and operations as plain values, for people and HTTP."""
        self.observe()
        return plain_view(self, self._clock())

    @property
    def failure(self) -> str | None:
        """Why experts are missing, in a sentence: a host cannot load one, or hosts have too few slots."""
        return self._load_failure or self.planning.failure

    @property
    def num_ready(self) -> int:
        """Experts that some host holds."""
        return len(frozenset[LogicalExpert]().union(*(member.ready for member in self.members.hosts.values())))

    def rebalance(self) -> Operation:
        """Asks for the best placement there is, whatever it costs to move. Returns at once; raises Outranked."""
        self._insist()
        operation, is_new = self.operations.begin("rebalance", "", "an operator asks for a rebalance")
        if not self.experts:
            self.operations.end(operation, "done", "a dense model has no experts to place")
        elif is_new:
            self.observe()
        return self.operations.get(operation.id)

    def drain(self, host_id: str) -> Operation:
        """Asks for a host without experts, which gets none for as long as it lives. Returns at once; raises UnknownHost or Outranked."""
        self._insist()
        known = sorted(key.replica_id for key in self.members.hosts)
        if host_id not in known:
            raise UnknownHost(f"there is no expert host {host_id}; those alive: {', '.join(known) or 'none'}")
        operation, is_new = self.operations.begin("drain", host_id, f"an operator drains host {host_id}")
        if is_new:
            self.observe()
        return self.operations.get(operation.id)

    def operation(self, operation_id: str) -> Operation:
        """Raises UnknownOperation."""
        self.observe()
        return self.operations.get(operation_id)

    def set_scaling(self, bounds: Mapping[str, Mapping[str, float]]) -> Operation:
        """Bounds by role, {"expert_host": {"min_replicas": 2, "max_replicas": 8}}; other roles keep theirs. BadBounds, Outranked."""
        self._insist()
        self.bounds.set(bounds)
        text = self.bounds.as_text()
        operation, is_new = self.operations.begin("scaling", text, f"an operator sets the bounds of scaling: {text}")
        if is_new:
            for older in self.operations.open("scaling"):
                if older.id != operation.id:
                    self.operations.end(older, "rolled_back", f"replaced by {operation.id}")
            self._changed()
            self.observe()
        return self.operations.get(operation.id)

    def announce_closing(self) -> None:
        """The application is about to be deleted: hosts may go as they are, and nothing is planned any more."""
        if not self.is_closing:
            self.is_closing = True
            self.log.tell("closing", "the application is closing: hosts may leave at once")
            for operation in self.operations.open():
                self.operations.end(operation, "rolled_back", "the application is closing")
            self._changed()

    @property
    def has_told_closing(self) -> bool:
        """Whether every host knows."""
        return self.is_closing and self._told_closing >= set(self.members.hosts)

    # -- the state that outlives it

    def dirty_state(self) -> StoredState | None:
        """What should be written to the store now, None if nothing should; then `saving` is told how that went."""
        return None if self.is_outranked else self.saving.due(lambda: state_of(self, self._clock()))

    def take_up(self, stored: StoredState) -> None:
        """Goes on from what an earlier Coordinator left behind; once anything is planned, only its epoch counts."""
        if stored.version.epoch >= self.epoch:
            self._raise_or_end(stored.version.epoch)
        if not self.planning.has_begun:
            take_up(self, stored, self._clock())

    # -- epochs, leases, settling

    def outrank(self, epoch: int) -> None:
        """Somebody has, or had, this epoch: see `_meet`."""
        if epoch > self.epoch:
            self._raise_or_end(epoch)

    def _meet(self, epoch: int) -> None:
        """Versions never go backwards: a member that knows a higher epoch follows another Coordinator, or one that is dead.

        Until it has planned or published anything a Coordinator goes above what it meets; afterwards it ends itself.
        """
        self.outrank(epoch)
        self._insist()

    def _insist(self) -> None:
        """Gives no orders and takes none once another is in charge."""
        if self.is_outranked:
            raise Outranked(f"epoch {self.epoch} is not the highest any more")

    def _raise_or_end(self, epoch: int) -> None:
        if self.planning.has_begun:
            if not self.is_outranked:
                self.log.tell("epoch", f"epoch {epoch} is above this coordinator's {self.epoch}: it ends itself")
            self.is_outranked = True
        else:
            self.epoch = epoch + 1 + self._salt
            self._begin_maps()
        self._changed()

    def _begin_maps(self) -> None:
        """A dense model's map is empty, complete and published from the start."""
        self.maps = PublishedMaps(self.epoch)
        if not self.experts:
            self.maps.consider((), {}, {}, (), 1)

    def observe(self) -> None:
        """Ends leases, plans, publishes, follows operations: whatever the time has come for. Cheap when nothing has changed."""
        now = self._clock()
        self._notice_absence(now)
        if self.is_outranked:
            return
        self._end_leases(now)
        self._note_failures()
        if not self.is_closing and self.experts:
            self._settle(now)
            if self._is_settled:
                self._plan(now)
                self._publish(now)
        if self._progress.follow(self._in_use()):
            self._is_stale = True
            self._changed()

    def _notice_absence(self, now: float) -> None:
        """After a sleep of half a lease what it knows is old, and reports that waited for it may be too: as after a start."""
        away_s, self._observed_s = now - self._observed_s, now
        if away_s > self.limits.lease_s / 2 and (self.members.hosts or self.members.routers):
            self.log.tell("lease", f"the coordinator was away for {away_s:.1f} s: all leases begin anew")
            self.members.renew_all(now)
            self._settles_from_s, self._is_settled = now, False

    def _end_leases(self, now: float) -> None:
        for key, silence_s in self.members.lapsed_hosts(now).items():
            was_leaving = self.members.hosts[key].report.is_leaving
            self.members.end_host(key)
            self.planning.host_lost(key, now, was_leaving=was_leaving)
            self._is_stale = True
            silent = f"has been silent for {silence_s:.1f} s: its lease ended"
            what, event = ("has left", "host_left") if was_leaving else (silent, "host_lost")
            self.log.tell("member", f"host {key.replica_id} {what}", event=event)
        for key, silence_s in self.members.lapsed_routers(now).items():
            event = "router_left" if self.members.routers[key].report.is_leaving else "router_lost"
            self.members.end_router(key, now)
            self._is_stale = True
            self.log.tell("member", f"router {key.replica_id} has been silent for {silence_s:.1f} s: its lease ended", event=event)

    def _note_failures(self) -> None:
        reports = [member.report for member in self.members.hosts.values()]
        failure = next((f"host {report.key.replica_id}: {report.failure}" for report in reports if report.failure), None)
        if failure is not None and failure != self._load_failure:
            self.log.tell("failure", failure)
        self._load_failure = failure

    def _settle(self, now: float) -> None:
        """Everybody who may remember a map has had a lease to say so; a first start has all members, and none remembers any.

        Members that have seen our epoch follow no lower one: none can come to remember another's map.
        """
        if self._is_settled:
            return
        hosts = [member.report for member in self.members.hosts.values()]
        routers = [member.report for member in self.members.routers.values()]
        is_memory = any(report.adopted or report.held for report in routers) or any(report.ready for report in hosts)
        is_complete = len(hosts) >= self.limits.num_hosts and len(routers) >= self.limits.num_routers
        is_ours = all(epoch == self.epoch for epoch in self.members.epochs_seen())
        is_first = is_complete and is_ours and not is_memory and not self.planning.has_begun
        if is_first or now - self._settles_from_s > self.limits.lease_s:
            self._is_settled = self._is_stale = True
            self._changed()

    # -- planning and publishing

    def _plan(self, now: float) -> None:
        rates = self.loads.experts_long.rates
        if self.planning.is_due(now):
            self.planning.replan(rates(now), now)
            self._is_stale = True
            self._changed()
        is_rescue_due = self._is_stale or bool(self.members.suspected_for(now))
        if self.planning.has_begun and is_rescue_due and self.planning.rescue(rates(now), now):
            self._is_stale = True
            self._changed()

    def _publish(self, now: float) -> None:
        """A map of ready replicas only, once every expert has one and the map would say something new."""
        may_publish = not self._may_wait(now)
        if not self._is_stale and not (self.maps.has_news and may_publish):
            return
        self._is_stale = False
        suspects, min_replicas = self.members.suspected_for(now), self.limits.planner.min_replicas
        hosts, desired = self.members.hosts, self.planning.desired
        placement = self.maps.consider(self.experts, hosts, desired, suspects, min_replicas, may_publish=may_publish)
        if placement is None:
            return
        self.maps.forget_unused(self.members.routers.values())
        self._published_s = now
        epoch, n = placement.version
        self.log.tell("publish", f"published map {epoch}.{n}: {len(self.experts)} experts on {len(placement.hosts)} hosts", version=n)
        self._changed()

    def _may_wait(self, now: float) -> bool:
        """Whether the next map can wait for more to be ready: every map costs all routers and hosts some milliseconds."""
        waited_s = now - max(self._published_s, self.planning.planned_s)
        if waited_s >= self.limits.publish_interval_s or self.planning.is_ready():
            return False
        return self.maps.is_sound(self.members.hosts) and not self.members.suspected_for(now)

    def _in_use(self) -> list[PlacementMap] | None:
        """The maps that a router may use; None while some may be unknown."""
        return self.maps.in_use(self.members.routers.values()) if self._is_settled else None

    def _may_leave(self, report: HostReport) -> bool:
        if self.is_closing or not (report.is_leaving and self._is_settled):
            return self.is_closing
        in_use = self._in_use()
        return not self.members.routers or (in_use is not None and not named_by(in_use, report.key))

    def _changed(self) -> None:
        self.generation += 1
        self.saving.touch()


def _capacity(report: HostReport) -> object:
    """What the plan depends on, beside who lives."""
    return report.slots, report.bytes_limit, report.speed


def _placement_news(report: RouterReport) -> object:
    """What of a router's report placement depends on."""
    return report.adopted, report.suspects, report.dead
