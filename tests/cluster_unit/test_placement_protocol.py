"""The protocol of placement as a state machine: whatever is lost, late, doubled, killed, frozen or forgotten, its promises hold.

What it takes for granted, as a deployment does: a call is given up after CALL_TIMEOUT_S, and two Coordinators run side by side for
less than a lease. A Coordinator that was frozen may hear any report however late.
"""

import random
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.duties import HostDuties, RouterDuties
from actors.exchange import CALL_TIMEOUT_S, HostReport, RouterReport
from cluster.coordinator import Coordinator, Outranked
from cluster.coordinator_limits import CoordinatorLimits
from cluster.placement import PlannerSettings
from cluster.state_store import MemoryStore, StoreOutranked
from model.logical_expert import LogicalExpert
from router.placement_map import Endpoint, HostKey
from tests.cluster_unit.made_up_members import Clock

EXPERTS = [LogicalExpert(1, expert) for expert in range(4)]
LEASE_S = 5.0
MAX_OVERLAP_S = 3.5  # of two Coordinators
STEP_S = 0.5
COMINGS_AND_GOINGS = ("host", "host", "router", "kill host", "kill router", "leave", "suspect", "trust")
FATES = ("fine", "fine", "fine", "answer is late", "answer is lost", "late", "late", "held")
places = st.integers(0, 99)


@dataclass(eq=False)
class Call:
    member: "Host | Router"
    report: HostReport | RouterReport
    coordinator: "Process"
    sent_s: float
    is_heard: bool = False
    orders: object = None
    had_no_router: bool = False  # when the orders were given: then a host may leave with whatever it holds


@dataclass(eq=False)
class Process:
    """A Coordinator with its time of start; `is_frozen` while it does not run."""

    coordinator: Coordinator
    started_s: float
    is_frozen: bool = False
    has_slept: bool = False
    last_map: object = None


@dataclass(eq=False)
class Host:
    key: HostKey
    slots: int | None
    duties: HostDuties = field(default_factory=HostDuties)
    held: frozenset = frozenset()
    number: int = 0
    call: Call | None = None
    died_s: float | None = None

    def report(self):
        self.number += 1
        endpoint = Endpoint("node", self.key.replica_id, "127.0.0.1", 1)
        seen, leaving = self.duties.epoch_seen, self.duties.is_leaving
        return HostReport(self.key, endpoint, self.number, self.held, slots=self.slots, epoch_seen=seen, is_leaving=leaving)


@dataclass(eq=False)
class Router:
    key: HostKey
    duties: RouterDuties = field(default_factory=RouterDuties)
    pinned: list = field(default_factory=list)  # adopted maps, oldest first, that a step still uses
    number: int = 0
    call: Call | None = None
    died_s: float | None = None
    suspects: tuple = ()
    heard_s: dict = field(default_factory=dict)  # by Coordinator, when it last heard this router

    def report(self):
        self.number += 1
        adopted = self.pinned[0].version if self.pinned else None
        endpoint = Endpoint("node", self.key.replica_id, "127.0.0.1", 1)
        seen, held = self.duties.epoch_seen, self.duties.held
        return RouterReport(self.key, endpoint, self.number, adopted, self.suspects, epoch_seen=seen, held=held)


class Protocol(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.random = random.Random(0)
        self.store = MemoryStore()
        self.old_states = [None]
        self.processes = []
        self.hosts, self.routers = [], []
        self.calls = []
        self.contents = {}
        self.num_started = 0

    # -- what there is

    @initialize(min_replicas=st.integers(1, 2), slots=st.sampled_from([None, 4, 6]), num_hosts=st.integers(1, 3))
    def begin(self, min_replicas, slots, num_hosts):
        self.slots = slots
        self.limits = CoordinatorLimits(
            num_hosts=num_hosts, num_routers=1, lease_s=LEASE_S, orphan_grace_s=6.0, rebalance_interval_s=4.0, operation_timeout_s=30.0,
            planner=PlannerSettings(min_replicas=min_replicas, redundancy=0.25, min_gain=0.0),
        )  # fmt: skip
        for _ in range(num_hosts):
            self.start_host()
        self.start_router()
        self.start_coordinator(0, 0)
        self.rounds(6)

    def alive(self, members):
        return [member for member in members if member.died_s is None]

    @property
    def members(self):
        return self.alive(self.hosts) + self.alive(self.routers)

    @property
    def running(self):
        return [process for process in self.processes if not process.is_frozen]

    def name(self, kind):
        self.num_started += 1
        return HostKey(f"{kind}{self.num_started}", self.num_started)

    @rule(what=st.sampled_from(COMINGS_AND_GOINGS), place=places, of=places)
    def come_and_go(self, what, place, of):
        hosts, routers = self.alive(self.hosts), self.alive(self.routers)
        if what == "host" and len(hosts) < 4:
            self.start_host()
        elif what == "router" and len(routers) < 3:
            self.start_router()
        elif what == "kill host" and len(hosts) > 1:
            hosts[place % len(hosts)].died_s = self.clock.now
        elif what == "kill router" and len(routers) > 1:
            routers[place % len(routers)].died_s = self.clock.now
        elif what == "leave":
            hosts[place % len(hosts)].duties.is_leaving = True
        elif what == "suspect":  # rightly or wrongly
            routers[place % len(routers)].suspects = (self.hosts[of % len(self.hosts)].key,)
        elif what == "trust":
            routers[place % len(routers)].suspects = ()

    def start_host(self):
        self.hosts.append(Host(self.name("host"), self.slots))

    def start_router(self):
        self.routers.append(Router(self.name("router")))

    @rule(what=st.sampled_from(["start", "start", "kill", "freeze", "wake", "save", "save"]), place=places, memory=st.integers(0, 2))
    def shake_coordinators(self, what, place, memory):
        if what == "start" and len(self.processes) < 2:
            self.start_coordinator(memory, place)
        elif self.processes:
            process = self.processes[place % len(self.processes)]
            if what == "kill":
                self.processes.remove(process)
            elif what == "freeze":
                process.is_frozen = process.has_slept = True
            elif what == "wake":
                process.is_frozen = False
            elif what == "save" and not process.is_frozen:
                self.save(process.coordinator)

    def start_coordinator(self, memory, age):
        """With the store as it is, with one that was lost, or with an old copy; its clock may have gone back."""
        stored = [self.store.read(), None, self.old_states[age % len(self.old_states)]][memory]
        epoch = 1 + age if memory else int(self.clock.now * 1000)
        self.num_started += 1
        salt = 1000 * self.num_started
        new = Coordinator(EXPERTS, self.limits, self.clock, epoch, wall_clock=self.clock, salt=salt, stored=stored)
        self.processes.append(Process(new, self.clock.now))

    def save(self, coordinator):
        state = coordinator.dirty_state()
        if state is not None:
            self.old_states.append(state)
            try:
                self.store.write(state)
            except StoreOutranked as error:
                coordinator.outrank(error.epoch)

    # -- calls, in every stage and order

    @precondition(lambda self: self.processes)
    @rule(place=places, to=places, fate=st.sampled_from(FATES))
    def exchange(self, place, to, fate):
        member = self.members[place % len(self.members)]
        if member.call is not None:
            if fate != "late":
                return
            member.call = None  # its own time-out: what it sent may still arrive
        call = member.call = Call(member, member.report(), self.processes[to % len(self.processes)], self.clock.now)
        self.calls.append(call)
        if fate != "late":
            self.hear(call, is_held=fate == "held")
        if fate == "answer is lost":
            self.fail(call)
        elif fate == "fine":
            self.answer(call)

    @precondition(lambda self: self.calls)
    @rule(place=places)
    def go_on_with_a_call(self, place):
        """A report arrives late, or a second time; a held answer goes out, as things are now; an answer arrives late."""
        call = self.calls[place % len(self.calls)]
        if not call.is_heard:
            self.hear(call)
        elif call.orders is None:
            self.release(call)
        else:
            if place % 2:
                self.hear(call)
            self.answer(call)

    def hear(self, call, *, is_held=False):
        process = call.coordinator
        if process not in self.running:
            return
        coordinator = process.coordinator
        try:
            if isinstance(call.member, Router):
                first = not call.is_heard
                orders = coordinator.exchange_router(call.report)
                call.orders = orders if first else call.orders
                call.member.heard_s[process] = self.clock.now if first else call.member.heard_s.get(process, 0.0)
            else:
                coordinator.hear_host(call.report)
                if not is_held and not call.is_heard:
                    self.release(call)
            call.is_heard = True
        except Outranked:
            self.fail(call)
        self.look_at(process)

    def release(self, call):
        if call.coordinator in self.running:
            try:
                call.orders = call.coordinator.coordinator.host_orders(call.report)
                call.had_no_router = not any(self.is_live(router, call.coordinator) for router in self.alive(self.routers))
            except Outranked:
                self.fail(call)

    def answer(self, call):
        if call.orders is None or call not in self.calls:
            return
        self.calls.remove(call)
        if call.member.call is call and call.member.died_s is None:
            call.member.call = None
            self.obey(call)

    def fail(self, call):
        if call in self.calls:
            self.calls.remove(call)
        if call.member.call is call:
            call.member.call = None

    def obey(self, call):
        member = call.member
        if isinstance(member, Router):
            member.duties.obey(call.orders)
            return
        dropped = member.duties.obey(call.orders, member.held)
        self.check_drops(member, dropped, call.coordinator)
        member.held -= dropped
        if member.duties.may_leave and member.duties.is_leaving:
            if not call.had_no_router:
                self.check_drops(member, member.held, call.coordinator)
            member.died_s = self.clock.now
            if not self.alive(self.hosts):
                self.start_host()

    # -- what members do by themselves

    @rule(place=places, num=st.integers(1, 4))
    def load(self, place, num):
        hosts = self.alive(self.hosts)
        host = hosts[place % len(hosts)]
        host.held |= frozenset(host.duties.to_load(host.held, host.slots)[:num])

    @rule(place=places, ends_step=st.booleans())
    def adopt(self, place, ends_step):
        routers = self.alive(self.routers)
        router = routers[place % len(routers)]
        self.let_adopt(router)
        if ends_step:
            router.pinned = router.pinned[-1:]

    def let_adopt(self, router):
        newest = router.duties.map
        if newest is None or (router.pinned and router.pinned[-1].version == newest.version):
            return
        assert not router.pinned or newest.version > router.pinned[-1].version, "adopted versions never go backwards"
        assert newest.is_complete(EXPERTS)
        if self.processes and self.is_live(router, self.processes[-1]):
            self.check_named(newest)
        router.pinned.append(newest)

    @precondition(lambda self: self.running)
    @rule(place=places, what=st.sampled_from(["drain", "rebalance", "rearrange", "rearrange", "rearrange"]), of=places)
    def plan(self, place, what, of):
        """An operator asks; or the planner has seen another load, and wants each expert on one or two other hosts."""
        process = self.running[place % len(self.running)]
        coordinator = process.coordinator
        hosts = sorted(coordinator.members.hosts)
        if what == "drain" and hosts:
            coordinator.drain(hosts[of % len(hosts)].replica_id)
        elif what == "rebalance":
            coordinator.rebalance()
        elif coordinator.planning.has_begun and hosts and self.slots != 4:
            wanted = {key: set() for key in hosts}
            for number, expert in enumerate(EXPERTS):
                wanted[hosts[(of >> number) % len(hosts)]].add(expert)
                wanted[hosts[(place >> number) % len(hosts)]].add(expert)
            coordinator.planning.desired = {key: frozenset(experts) for key, experts in wanted.items()}
            coordinator._is_stale = True
        coordinator.observe()
        self.look_at(process)

    @rule(num=st.integers(1, 6))
    def pass_time(self, num):
        for _ in range(num):
            self.clock.now += STEP_S
            self.end_what_is_due()
            for process in self.running:
                process.coordinator.observe()
                self.look_at(process)

    def end_what_is_due(self):
        """Serve ends the older of two Coordinators, and one that met a higher epoch; calls grow too old to arrive."""
        newest_s = max((process.started_s for process in self.processes), default=0.0)
        is_late = self.clock.now - newest_s > MAX_OVERLAP_S
        self.processes = [
            process for process in self.processes if not process.coordinator.is_outranked and (process is self.processes[-1] or not is_late)
        ]
        for call in list(self.calls):
            is_dead = call.coordinator not in self.processes
            if is_dead or (self.clock.now - call.sent_s > CALL_TIMEOUT_S and not call.coordinator.has_slept):
                self.fail(call)

    @precondition(lambda self: self.running)
    @rule(num=st.integers(1, 4))
    def rounds(self, num):
        """Everybody does what is next, and is heard at once."""
        for _ in range(num):
            for member in self.members:
                if member.call is None and self.running:
                    call = Call(member, member.report(), self.random.choice(self.running), self.clock.now)
                    member.call = call
                    self.calls.append(call)
                    self.hear(call)
                    self.answer(call)
            for host in self.alive(self.hosts):
                host.held |= frozenset(host.duties.to_load(host.held, host.slots))
            for router in self.alive(self.routers):
                self.let_adopt(router)
                router.pinned = router.pinned[-1:]
            self.pass_time(1)

    # -- what must hold

    def is_live(self, router, process):
        """Whether this Coordinator must count on it: it was heard there within the lease; or, by those before, very lately."""
        if process in router.heard_s:
            return self.clock.now - router.heard_s[process] <= LEASE_S
        if process is not self.processes[-1]:
            return False
        return self.clock.now - max(router.heard_s.values(), default=-99.0) <= LEASE_S - MAX_OVERLAP_S - STEP_S

    def look_at(self, process):
        placement = process.coordinator.maps.current
        if placement is None or placement is process.last_map:
            return
        process.last_map = placement
        known = self.contents.setdefault(placement.version, placement.expert_to_hosts)
        assert known == placement.expert_to_hosts, "a version names one map"
        assert placement.is_complete(EXPERTS), "a published map uncovers no expert"
        self.check_named(placement)

    def check_named(self, placement):
        """A host that lives holds what it is named for."""
        by_key = {host.key: host for host in self.hosts}
        for expert, keys in placement.expert_to_hosts.items():
            for key in keys:
                host = by_key[key]
                assert host.died_s is not None or expert in host.held, f"{key} is named for {expert}, which is not ready there"

    def check_drops(self, host, dropped, process):
        for router in self.alive(self.routers):
            if self.is_live(router, process):
                named = frozenset().union(*(placement.host_to_experts.get(host.key, frozenset()) for placement in router.pinned))
                assert not named & dropped, f"{router.key} has adopted a map that names {host.key} for {named & dropped}"
        for expert in dropped:
            others = [other for other in self.hosts if other is not host and expert in other.held]
            # The Coordinator cannot know that a host died within its lease.
            others = [other for other in others if other.died_s is None or self.clock.now - other.died_s <= 2 * LEASE_S]
            assert others, f"the last replica of {expert} is dropped"

    @invariant()
    def versions_are_in_order(self):
        for router in self.routers:
            versions = [placement.version for placement in router.pinned]
            assert versions == sorted(versions)

    def teardown(self):
        """Left in peace, with hosts enough, it comes to rest: all experts published, every host as desired, every router up to date."""
        if not self.routers:
            return
        self.processes = self.processes[-1:]
        if not self.processes:
            self.start_coordinator(1, 0)
        for process in self.processes:
            process.is_frozen = False
        for router in self.routers:
            router.suspects = ()
        for call in list(self.calls):
            self.fail(call)
        while len([host for host in self.alive(self.hosts) if not host.duties.is_leaving]) < 3:
            self.start_host()
        for _ in range(40):
            self.rounds(2)
            if not self.processes:
                self.start_coordinator(1, 0)
        coordinator = self.processes[-1].coordinator
        current = coordinator.maps.current
        assert current is not None, coordinator.log.lines[-5:]
        assert coordinator.planning.is_converged()
        alive = {host.key for host in self.alive(self.hosts)}
        for keys in current.expert_to_hosts.values():
            assert set(keys) <= alive
        assert all(router.pinned[-1].version == current.version for router in self.alive(self.routers))
        assert not any(host.duties.is_leaving for host in self.alive(self.hosts)), "whoever wanted to leave has left"


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=150, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck))
