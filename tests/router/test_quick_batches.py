"""Batches that machine code sends and awaits, over real sockets and shared memory, and how they become ordinary ones."""

import contextlib
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.experts import ExpertSlots, LocalExperts
from router.dispatch import DispatchLimits, DistributedExperts
from router.errors import ExpertsUnavailable
from router.expert_server import ExpertServer
from router.placement_map import HostKey, MapVersion, PlacementMap
from router.quick_batches import QuickBatches
from router.transport.channel import ChannelLimits
from router.transport.connect import connect
from router.transport.frames import FrameKind, Header, pack_header
from router.transport.listener import Listener
from tests.router.expert_cluster import LAYERS, assert_close, key, make_batch, make_experts, wait_until

torch.set_num_threads(1)

NUM_EXPERTS, TOP_K = 8, 3
SECRET = b"secret"
# A batch that is looked after becomes an ordinary one: here only where a test is about that, however slow the machine is.
LIMITS = DispatchLimits(step_timeout_s=60.0, look_interval_s=30.0, reconnect_interval_s=0.02)
IMPATIENT = DispatchLimits(step_timeout_s=20.0, look_interval_s=0.02, reconnect_interval_s=0.02)


@dataclass
class Host:
    """`in_place` false: all goes through the compute thread."""

    slots: ExpertSlots
    server: ExpertServer
    listener: Listener

    def close(self):
        self.listener.close()
        self.server.close()


class Node:
    """Hosts of this node by key, routers to them, and a watch on how batches went."""

    def __init__(self, stack, num_replicas=1, names="ab", in_place=True, slots_type=ExpertSlots):
        self.experts = make_experts(NUM_EXPERTS)
        self.local = LocalExperts(ExpertSlots(self.experts.items()))
        self.hosts = {}
        self._stack = stack
        keys = [key(name) for name in names]
        self.placed = {
            expert: tuple(keys[(expert.expert + replica) % len(keys)] for replica in range(num_replicas)) for expert in sorted(self.experts)
        }
        for host in keys:
            slots = slots_type((expert, self.experts[expert]) for expert, holders in self.placed.items() if host in holders)
            server = ExpertServer(slots)
            listener = Listener(SECRET, "app", "node", on_frame=server.on_frame, in_place=server.in_place if in_place else None)
            self.hosts[host] = Host(slots, server, listener)
            stack.callback(self.hosts[host].close)

    def map(self, n=1):
        return PlacementMap(MapVersion(1, n), {host: each.listener.endpoint for host, each in self.hosts.items()}, self.placed)

    def router(self, limits=LIMITS, channel_limits=None, node_id="node"):
        opened = {}  # side by side, in any order

        def open_channel(host: HostKey, endpoint):
            opened[host] = connect(endpoint, node_id, SECRET, "app", channel_limits)
            return opened[host]

        experts = self._stack.enter_context(contextlib.closing(DistributedExperts(open_channel, self.map, limits)))
        experts.adopt(self.map())
        wait_until(lambda: len(opened) == len(self.hosts))
        hidden, routing = make_batch(16, NUM_EXPERTS, TOP_K)
        wait_until(lambda: experts.combine(experts.dispatch(1, hidden, routing)) is not None and experts.num_frames > 0)
        experts.channels = opened
        return experts

    def expected(self, layer, hidden, routing):
        return self.local.combine(self.local.dispatch(layer, hidden, routing))


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def watch(monkeypatch):
    """What `send`, `collect` and `settle` of all routers came to."""
    seen = {"sent": 0, "not sent": 0, "collected": 0, "settled": 0}
    send, collect, settle = QuickBatches.send, QuickBatches.collect, QuickBatches.settle

    def watched_send(self, *arguments):
        batch = send(self, *arguments)
        seen["sent" if batch is not None else "not sent"] += 1
        return batch

    def watched_collect(self, *arguments):
        total = collect(self, *arguments)
        seen["collected"] += total is not None
        return total

    def watched_settle(self, *arguments):
        seen["settled"] += 1
        return settle(self, *arguments)

    monkeypatch.setattr(QuickBatches, "send", watched_send)
    monkeypatch.setattr(QuickBatches, "collect", watched_collect)
    monkeypatch.setattr(QuickBatches, "settle", watched_settle)

    def take():
        taken = dict(seen)
        seen.update(dict.fromkeys(seen, 0))
        return taken

    return take


def check(node, router, num_tokens=5, layer=1, seed=0, top_k=TOP_K):
    hidden, routing = make_batch(num_tokens, NUM_EXPERTS, top_k, seed)
    assert_close(router.combine(router.dispatch(layer, hidden, routing)), node.expected(layer, hidden, routing))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_is_what_local_experts_make_of_it(stack, data):
    node = _shared_node(stack)
    num_tokens, top_k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, NUM_EXPERTS))
    check(*node, num_tokens, data.draw(st.sampled_from(LAYERS)), data.draw(st.integers(0, 2**31)), top_k)


_nodes: dict[int, tuple] = {}


def _shared_node(stack):
    if id(stack) not in _nodes:
        _nodes.clear()
        node = Node(stack, num_replicas=2, names="abc")
        _nodes[id(stack)] = node, node.router()
    return _nodes[id(stack)]


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("in_place", [True, False])
def test_whole_steps_go_quickly(stack, watch, num_replicas, in_place):
    node = Node(stack, num_replicas, in_place=in_place)
    router = node.router()
    router.take_load()
    watch()
    for seed in range(20):
        check(node, router, 1 + seed, LAYERS[seed % 2], seed)
    assert watch() == {"sent": 20, "not sent": 0, "collected": 20, "settled": 0}
    assert sum(router.take_load().values()) == TOP_K * sum(range(1, 21))
    assert router.acknowledged == MapVersion(1, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_micro_batches_are_on_their_way_at_once(stack, watch, order):
    node = Node(stack)
    router = node.router()
    watch()
    for round_number in range(5):
        batches = [make_batch(4 + number, NUM_EXPERTS, TOP_K, 7 * round_number + number) for number in range(2)]
        handles = [router.dispatch(1, *batch) for batch in batches]
        totals = {number: router.combine(handles[number]) for number in order}
        for number, batch in enumerate(batches):
            assert_close(totals[number], node.expected(1, *batch))
    seen = watch()
    assert seen["sent"] == 10
    if order == (0, 1):
        assert seen["collected"] == 10


def test_five_open_batches_and_then_none(stack, watch):
    node = Node(stack)
    router = node.router()
    for _ in range(3):
        batches = [make_batch(3, NUM_EXPERTS, TOP_K, seed) for seed in range(5)]
        handles = [router.dispatch(3, *batch) for batch in batches]
        for handle, batch in zip(handles, batches, strict=True):
            assert_close(router.combine(handle), node.expected(3, *batch))
    watch()
    check(node, router)
    assert watch()["collected"] == 1


def test_abandoned_batches_leave_the_channel_sound(stack):
    node = Node(stack)
    router = node.router()
    for seed in range(10):
        hidden, routing = make_batch(6, NUM_EXPERTS, TOP_K, seed)
        router.abandon(router.dispatch(1, hidden, routing))
        check(node, router, seed=seed)


def test_what_a_host_does_not_hold_is_told_and_looked_for_elsewhere(stack, watch):
    node = Node(stack, num_replicas=2)
    router = node.router()
    check(node, router)
    gone = [expert for expert in sorted(node.experts) if expert.layer == 1][:4]
    for expert in gone:
        node.hosts[key("a")].slots.unload(expert)
    watch()
    for seed in range(8):
        check(node, router, 9, seed=seed)
    assert watch()["settled"] > 0
    assert router.num_by_trouble["not_here"] > 0
    for expert in gone:
        node.hosts[key("a")].slots.load(expert, node.experts[expert])
    check(node, router)


def test_an_expert_that_nobody_holds_is_named(stack):
    node = Node(stack)
    router = node.router(DispatchLimits(step_timeout_s=0.3, look_interval_s=0.02))
    expert = next(expert for expert in sorted(node.experts) if expert.layer == 3)
    node.hosts[node.placed[expert][0]].slots.unload(expert)
    hidden, routing = make_batch(30, NUM_EXPERTS, NUM_EXPERTS)
    with pytest.raises(ExpertsUnavailable, match=f"layer 3 experts.* {expert.expert}"):
        router.combine(router.dispatch(3, hidden, routing))
    check(node, router)


@pytest.mark.parametrize("num_open", [1, 2])
def test_a_host_that_ends_between_dispatch_and_combine(stack, num_open):
    node = Node(stack, num_replicas=2)
    router = node.router()
    batches = [make_batch(7, NUM_EXPERTS, TOP_K, seed) for seed in range(num_open)]
    node.hosts[key("a")].listener.close()
    handles = [router.dispatch(1, *batch) for batch in batches]
    for handle, batch in zip(handles, batches, strict=True):
        assert_close(router.combine(handle), node.expected(1, *batch))
    assert key("a") in router.suspects
    for seed in range(5):
        check(node, router, seed=seed)


def test_a_slow_host_is_asked_whether_it_lives_and_waited_for(stack):
    gate = threading.Event()

    class SlowSlots(ExpertSlots):
        def forward(self, layer, hidden, expert_ids, weights):
            assert gate.wait(20)
            return super().forward(layer, hidden, expert_ids, weights)

    gate.set()
    node = Node(stack, slots_type=SlowSlots)
    router = node.router(IMPATIENT)
    gate.clear()
    timer = threading.Timer(0.3, gate.set)
    hidden, routing = make_batch(5, NUM_EXPERTS, TOP_K)
    started = time.monotonic()
    timer.start()
    assert_close(router.combine(router.dispatch(1, hidden, routing)), node.expected(1, hidden, routing))
    assert time.monotonic() - started > 0.25
    assert not router.suspects
    assert all(channel.heartbeat.last_heard > started for channel in router.channels.values())
    check(node, router)


def test_a_frame_that_the_socket_does_not_take_is_sent_later(stack, watch):
    node = Node(stack)
    router = node.router()
    check(node, router)
    stream = router.channels[key("a")].stream
    stands, held = threading.Event(), threading.Event()
    # The host's listener is held up by a handler that waits, and the socket is filled with cancellations of nothing.
    listener = node.hosts[key("a")].listener
    turn = listener._turn
    listener._turn = lambda fd, events: (stands.set(), held.wait(20), turn(fd, events))
    filler = pack_header(Header(FrameKind.CANCEL, stream.incarnation, 1 << 40))
    stream._sock.send(filler)
    assert stands.wait(20)  # else it would take one more, and there would be room for ours
    with contextlib.suppress(BlockingIOError):
        while True:
            stream._sock.send(filler)
    hidden, routing = make_batch(9, NUM_EXPERTS, TOP_K, 3)
    watch()
    handle = router.dispatch(1, hidden, routing)
    assert watch()["settled"] == 1
    listener._turn = turn
    held.set()
    assert_close(router.combine(handle), node.expected(1, hidden, routing))
    check(node, router)
    watch()
    check(node, router)
    assert watch()["collected"] == 1


def test_batches_larger_than_any_buffer_go_the_ordinary_way(stack, watch):
    node = Node(stack)
    router = node.router(channel_limits=ChannelLimits(shared_bytes=1 << 13))
    check(node, router, 5)
    watch()
    check(node, router, 120)
    assert watch()["not sent"] == 1
    check(node, router, 5)
    assert watch()["collected"] >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_go_the_ordinary_way(stack, watch, dtype):
    node = Node(stack)
    router = node.router()
    hidden, routing = make_batch(5, NUM_EXPERTS, TOP_K, dtype=dtype)
    watch()
    assert router.combine(router.dispatch(1, hidden, routing)).dtype == dtype
    assert watch()["not sent"] == 1
    check(node, router)


def test_hosts_of_other_nodes_go_the_ordinary_way(stack, watch):
    node = Node(stack)
    router = node.router(node_id="elsewhere")
    watch()
    check(node, router)
    assert watch()["not sent"] == 1


def test_a_new_map_between_two_steps(stack, watch):
    node = Node(stack)
    router = node.router()
    watch()
    for n in range(2, 6):
        assert router.adopt(node.map(n))
        check(node, router, seed=n)
        assert router.acknowledged == MapVersion(1, n)
    assert watch()["collected"] == 4
