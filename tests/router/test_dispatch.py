"""Dispatch and combine over hosts equal LocalExperts, whatever the channels and hosts do; and nothing waits past its deadline."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import cpu_threads
from model.gate import Routing
from router.dispatch import DispatchLimits, DistributedExperts
from router.errors import ExpertsUnavailable, FrameError
from router.expert_server import ServerLimits
from router.placement_map import MapVersion
from router.transport.connect import connect
from router.transport.frames import FrameKind
from router.transport.listener import Listener
from router.transport.memory import MemoryChannel
from tests.router.expert_cluster import HIDDEN, LAYERS, LIMITS, Cluster, assert_close, key, make_batch, make_map, refuse, wait_until

torch.set_num_threads(1)

A, B, C = key("a"), key("b"), key("c")


def step(router, cluster: Cluster, layer: int = 1, seed: int = 0, num_tokens: int = 5, top_k: int = 3) -> None:
    """One batch there and back, compared with the truth."""
    num_experts = len(cluster.experts) // len(LAYERS)
    hidden, routing = make_batch(num_tokens, num_experts, min(top_k, num_experts), seed)
    assert_close(router.combine(router.dispatch(layer, hidden, routing)), cluster.expected(layer, hidden, routing))


def join(router, placement) -> None:
    """Adopts the map and waits for the channel to every host."""
    assert router.adopt(placement)

    def are_open() -> bool:
        router._links.refresh()
        return all(router._links.get(host) is not None for host in placement.hosts)

    wait_until(are_open)


def split_cluster(num_experts: int = 6) -> Cluster:
    """Experts dealt to a and b in turn."""
    cluster = Cluster(num_experts)
    for index, host in enumerate((A, B)):
        cluster.add_host(host, [expert for expert in cluster.experts if expert.expert % 2 == index])
    return cluster


def replicated_cluster(num_experts: int = 6) -> Cluster:
    """Everything on a and on b."""
    cluster = Cluster(num_experts)
    for host in (A, B):
        cluster.add_host(host, cluster.experts)
    return cluster


# -- the answer


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_equals_local_experts(data: st.DataObject):
    num_experts = data.draw(st.integers(1, 12), "experts")
    top_k = data.draw(st.integers(1, min(num_experts, 5)), "top_k")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    hosts = [key(f"host-{index}") for index in range(data.draw(st.integers(1, 4), "hosts"))]
    with Cluster(num_experts, seed=num_experts) as cluster:
        holders = {expert: data.draw(st.sets(st.sampled_from(hosts), min_size=1), str(expert)) for expert in cluster.experts}
        for host in hosts:
            cluster.add_host(host, [expert for expert in cluster.experts if host in holders[expert]])
            cluster.hosts[host].faults.answer_delay_s = data.draw(st.sampled_from([0.0, 0.0, 0.001, 0.003]))
            cluster.hosts[host].faults.num_answer_copies = data.draw(st.sampled_from([1, 2]))
        router = cluster.router()
        router.adopt(cluster.map())
        for number in range(3):
            hidden, routing = make_batch(data.draw(st.integers(1, 40), "tokens"), num_experts, top_k, number, dtype)
            actual = router.combine(router.dispatch(LAYERS[number % 2], hidden, routing))
            assert_close(actual, cluster.expected(LAYERS[number % 2], hidden, routing))


def test_a_token_goes_to_a_host_once_and_only_where_it_must():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        routing = Routing(torch.tensor([[0, 2], [1, 3], [0, 1]]), torch.full((3, 2), 0.5))
        hidden = torch.randn(3, HIDDEN)
        router.combine(router.dispatch(1, hidden, routing))
        (to_a,), (to_b,) = cluster.hosts[A].frames, cluster.hosts[B].frames
        assert to_a.request.expert_ids.tolist() == [[0, 2], [0, -1]]
        assert to_b.request.expert_ids.tolist() == [[1, 3], [-1, 1]]
        assert torch.equal(to_a.request.hidden, hidden[[0, 2]])
        assert to_a.request.map_version == MapVersion(1, 1)


def test_an_empty_batch_needs_no_host():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        hidden, routing = torch.empty(0, HIDDEN), Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
        assert router.combine(router.dispatch(1, hidden, routing)).shape == (0, HIDDEN)


def test_the_same_batch_gives_the_same_bits_in_whatever_order_answers_come():
    cluster = Cluster(9)
    for index, host in enumerate((A, B, C)):
        cluster.add_host(host, [expert for expert in cluster.experts if expert.expert % 3 == index])
    with cluster:
        router = cluster.router()
        join(router, cluster.map())
        hidden, routing = make_batch(7, 9, 6)
        answers = []
        for slow in (A, B, C):
            for host in (A, B, C):
                cluster.hosts[host].faults.answer_delay_s = 0.01 if host == slow else 0.0
            answers.append(router.combine(router.dispatch(1, hidden, routing)))
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])


def test_hosts_at_work_are_lent_a_core_each_until_they_have_answered(monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", [3])
    with split_cluster() as cluster:
        for host in (A, B):
            cluster.hosts[host].faults.answer_delay_s = 0.01
        router = DistributedExperts(cluster.open_channel, limits=replace(LIMITS, num_cores=4))
        join(router, cluster.map())
        much = 100 * cpu_threads.MIN_SHARE
        handle = router.dispatch(1, *make_batch(4, 6, 3))
        assert cpu_threads.num_shares_of(much) == 2
        router.combine(handle)
        assert cpu_threads.num_shares_of(much) == 3
        router.dispatch(1, *make_batch(4, 6, 3))
        router.close()  # gives up what is open
        assert cpu_threads.num_shares_of(much) == 3


@pytest.mark.parametrize("is_on_node", [True, False])
def test_helpers_rest_before_a_host_of_this_node_is_woken(monkeypatch, is_on_node):
    """A host that finds no idle core runs in place of the router, and the next host's frame waits for it."""
    order = []
    monkeypatch.setattr(MemoryChannel, "is_on_node", is_on_node)
    monkeypatch.setattr(cpu_threads, "rest", lambda: order.append("rest"))
    send = MemoryChannel.send
    monkeypatch.setattr(MemoryChannel, "send", lambda *arguments: (order.append("send"), send(*arguments)))
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        router.combine(router.dispatch(1, *make_batch(4, 6, 3)))
    assert order[:3] == (["rest", "send", "send"] if is_on_node else ["send", "send"])


def test_hosts_of_other_nodes_are_lent_none(monkeypatch):
    monkeypatch.setattr(cpu_threads, "_most", [3])
    monkeypatch.setattr(MemoryChannel, "is_on_node", False)
    with split_cluster() as cluster:
        for host in (A, B):
            cluster.hosts[host].faults.answer_delay_s = 0.01
        router = cluster.router()
        join(router, cluster.map())
        handle = router.dispatch(1, *make_batch(4, 6, 3))
        assert cpu_threads.num_shares_of(100 * cpu_threads.MIN_SHARE) == 3
        router.combine(handle)


def test_micro_batches_may_be_combined_in_any_order():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        batches = [make_batch(4, 6, 3, seed) for seed in range(3)]
        handles = [router.dispatch(1, *batch) for batch in batches]
        for index in (2, 0, 1):
            assert_close(router.combine(handles[index]), cluster.expected(1, *batches[index]))


def test_two_routers_and_three_hosts():
    cluster = Cluster(9)
    for index, host in enumerate((A, B, C)):
        cluster.add_host(host, [expert for expert in cluster.experts if expert.expert % 3 == index])
    with cluster:
        failures = []

        def run(offset: int) -> None:
            try:
                router = cluster.router()
                join(router, cluster.map())
                for seed in range(offset, offset + 30):
                    step(router, cluster, LAYERS[seed % 2], seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(offset,)) for offset in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert not any(thread.is_alive() for thread in threads)


def test_the_load_counts_every_choice_once():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        expected: dict = {}
        for seed in range(3):
            hidden, routing = make_batch(5, 6, 3, seed)
            router.combine(router.dispatch(3, hidden, routing))
            for expert in routing.expert_ids.flatten().tolist():
                expected[3, expert] = expected.get((3, expert), 0) + 1
        assert router.take_load() == expected
        assert router.take_load() == {}


# -- hosts that fail


def test_a_host_that_dies_is_replaced_by_its_replica_at_once():
    with replicated_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        cluster.hosts[A].memory.on_frame = lambda incoming: cluster.hosts[A].die()
        step(router, cluster)
        assert router.suspects == {A}
        assert router.num_by_trouble == {"lost": 1}
        for seed in range(4):
            step(router, cluster, seed=seed)


def test_answers_outlive_the_channel_that_brought_them():
    """Both micro-batches have an answer from a; then a dies; neither answer may be lost or read from a closed buffer."""
    with replicated_cluster() as cluster:
        router = cluster.router()
        join(router, make_map({A: cluster.experts}))
        batches = [make_batch(4, 6, 3, seed) for seed in range(2)]
        handles = [router.dispatch(1, *batch) for batch in batches]
        wait_until(lambda: cluster.hosts[A].memory.num_answered == 2)
        cluster.hosts[A].die()
        for handle, batch in zip(handles, batches, strict=True):
            assert_close(router.combine(handle), cluster.expected(1, *batch))


def test_a_batch_waits_for_a_map_with_its_expert_on_a_live_host():
    with split_cluster() as cluster:
        published = [cluster.map(n=1)]
        router = cluster.router(lambda: published[-1])
        router.adopt(published[-1])
        step(router, cluster)
        hidden, routing = make_batch(6, 6, 3, 1)
        cluster.hosts[A].memory.on_frame = lambda incoming: cluster.hosts[A].die()
        handle = router.dispatch(1, hidden, routing)

        def replace_host() -> None:
            cluster.add_host(C, cluster.hosts[A].slots.held())
            published.append(cluster.map(n=2))

        timer = threading.Timer(0.1, replace_host)
        timer.start()
        assert router.acknowledged == MapVersion(1, 1)
        assert_close(router.combine(handle), cluster.expected(1, hidden, routing))
        timer.join()
        assert router.acknowledged == MapVersion(1, 2)
        assert router.suspects == frozenset()
        assert router.adopt(published[-1])
        step(router, cluster, seed=2)


def test_a_broken_channel_to_a_living_host_is_opened_again():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        for seed in range(3):
            step(router, cluster, seed=seed)
            cluster.hosts[A].memory.disconnect()
        assert len(cluster.hosts[A].channels) == 3
        assert router.suspects == {A} or router.suspects == frozenset()


def test_a_host_that_cannot_be_reached_yet_is_waited_for():
    with split_cluster() as cluster:
        cluster.hosts[A].is_down = True
        router = cluster.router()
        router.adopt(make_map({host: entry.slots.held() for host, entry in cluster.hosts.items()}))
        timer = threading.Timer(0.1, lambda: setattr(cluster.hosts[A], "is_down", False))
        timer.start()
        step(router, cluster)
        timer.join()


def test_a_batch_that_kills_two_hosts_is_not_sent_to_a_third():
    cluster = Cluster(4)
    for host in (A, B, C):
        entry = cluster.add_host(host, cluster.experts)
        entry.memory.on_frame = lambda incoming, entry=entry: (entry.frames.append(incoming), entry.die())
    with cluster:
        router = cluster.router()
        join(router, cluster.map())
        hidden, routing = make_batch(1, 4, 1)
        with pytest.raises(ExpertsUnavailable, match=r"layer 1 experts \d: 2 hosts were lost while they had this batch"):
            router.combine(router.dispatch(1, hidden, routing))
        assert sum(len(entry.frames) for entry in cluster.hosts.values()) == 2


def test_without_a_live_host_the_deadline_holds_and_the_error_names_the_experts():
    with split_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, step_timeout_s=0.2))
        join(router, cluster.map())
        step(router, cluster)
        cluster.hosts[A].die()
        routing = Routing(torch.tensor([[0, 2], [1, 3]]), torch.full((2, 2), 0.5))
        started = time.monotonic()
        with pytest.raises(ExpertsUnavailable, match=r"no answer within 0.2 s; layer 3 experts 0, 2: host a was lost"):
            router.combine(router.dispatch(3, torch.randn(2, HIDDEN), routing))
        assert 0.2 <= time.monotonic() - started < 5
        assert router.suspects == {A}
        cluster.hosts[A].is_down = False  # back, and the next batch does not remember
        step(router, cluster, layer=3)


def test_a_host_that_stays_silent_is_suspected_after_the_deadline_and_trusted_when_it_answers():
    with split_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, step_timeout_s=0.2))
        join(router, cluster.map())
        cluster.hosts[A].faults.lose_request = lambda sequence, attempt: True
        with pytest.raises(ExpertsUnavailable, match="host a has not answered"):
            step(router, cluster)
        assert router.suspects == {A}
        cluster.hosts[A].faults.lose_request = lambda sequence, attempt: False
        step(router, cluster)
        assert router.suspects == frozenset()


def test_slow_is_not_dead():
    with split_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, resend_after_s=0.01))
        join(router, cluster.map())
        cluster.hosts[A].faults.answer_delay_s = 0.2
        step(router, cluster)
        assert len(cluster.hosts[A].frames) == 1
        assert router.suspects == frozenset()


def test_a_slow_frame_is_resent_to_a_replica_and_its_late_answer_dropped():
    with replicated_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, resend_after_s=0.02, max_resent_share=1.0))
        join(router, cluster.map())
        cluster.hosts[A].faults.answer_delay_s = 0.1
        for seed in range(8):
            step(router, cluster, seed=seed)
        assert any(incoming.attempt == 2 for incoming in cluster.hosts[B].frames)
        assert router.num_by_trouble["slow"] >= 1


def test_only_a_small_share_of_frames_is_resent_for_slowness():
    with replicated_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, resend_after_s=0.001, max_resent_share=0.1))
        join(router, cluster.map())
        for host in (A, B):
            cluster.hosts[host].faults.answer_delay_s = 0.02
        for seed in range(20):
            step(router, cluster, seed=seed)
        frames = [incoming for host in (A, B) for incoming in cluster.hosts[host].frames]
        num_resent = sum(incoming.attempt > 1 for incoming in frames)
        assert 1 <= num_resent <= 0.1 * len(frames) + 1


def test_lost_answers_are_made_good_by_a_replica():
    with replicated_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, resend_after_s=0.01, max_resent_share=1.0))
        join(router, cluster.map())
        cluster.hosts[A].faults.lose_answer = lambda sequence, attempt: attempt == 1
        for seed in range(5):
            step(router, cluster, seed=seed)


# -- hosts that refuse


def test_not_here_goes_to_another_replica():
    with replicated_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        for expert in cluster.hosts[A].slots.held():
            cluster.hosts[A].slots.unload(expert)
        step(router, cluster)
        assert router.suspects == frozenset()
        assert router.num_by_trouble == {"not_here": 1}


def test_not_here_without_a_replica_waits_for_a_newer_map():
    with split_cluster() as cluster:
        published = [cluster.map(n=1)]
        router = cluster.router(lambda: published[-1])
        router.adopt(published[-1])
        moved = sorted(cluster.hosts[A].slots.held())
        for expert in moved:
            cluster.hosts[A].slots.unload(expert)
            cluster.hosts[B].slots.load(expert, cluster.experts[expert])
        timer = threading.Timer(0.05, lambda: published.append(cluster.map(n=2)))
        timer.start()
        step(router, cluster)
        timer.join()
        assert len(cluster.hosts[A].frames) == 1  # not asked again under the same map


def test_busy_is_asked_again_later():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        serve, busy = cluster.hosts[A].memory.on_frame, refuse(FrameKind.BUSY)
        answers = iter([busy, busy, busy])
        cluster.hosts[A].memory.on_frame = lambda incoming: next(answers, serve)(incoming)
        step(router, cluster)
        assert next(answers, None) is None
        assert router.num_by_trouble == {"busy": 3}
        assert router.num_frames == 2 + 3


def test_credits_of_a_real_server_bound_its_queue_and_everyone_is_served():
    cluster = Cluster(4)
    cluster.add_host(A, cluster.experts, ServerLimits(max_queued_tokens=8))
    with cluster:
        routers = [cluster.router() for _ in range(4)]
        batches = [make_batch(6, 4, 2, seed) for seed in range(4)]
        for router in routers:
            join(router, cluster.map())
        handles = [router.dispatch(1, *batch) for router, batch in zip(routers, batches, strict=True)]
        for router, handle, batch in zip(routers, handles, batches, strict=True):
            assert_close(router.combine(handle), cluster.expected(1, *batch))


def test_always_busy_ends_at_the_deadline():
    with split_cluster() as cluster:
        router = cluster.router(limits=replace(LIMITS, step_timeout_s=0.1))
        join(router, cluster.map())
        cluster.hosts[A].memory.on_frame = refuse(FrameKind.BUSY)
        with pytest.raises(ExpertsUnavailable, match="host a is busy"):
            step(router, cluster)


def test_one_failure_is_forgiven_a_second_is_the_batch_s_own():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        serve, fail = cluster.hosts[A].memory.on_frame, refuse(FrameKind.FAILED, "out of memory")
        answers = iter([fail])
        cluster.hosts[A].memory.on_frame = lambda incoming: next(answers, serve)(incoming)
        step(router, cluster)
        assert router.num_by_trouble == {"failed": 1}
        answers = iter([fail, fail])
        with pytest.raises(ExpertsUnavailable, match="2 attempts failed; host a failed: out of memory"):
            step(router, cluster)
        step(router, cluster)


# -- buffers


def test_full_channels_are_waited_for_even_when_another_micro_batch_has_the_buffers():
    with split_cluster() as cluster:
        for host in (A, B):
            cluster.hosts[host].max_frames = 1
        router = cluster.router()
        join(router, cluster.map())
        batches = [make_batch(4, 6, 3, seed) for seed in range(3)]
        handles = [router.dispatch(1, *batch) for batch in batches]
        for index in (1, 2, 0):
            assert_close(router.combine(handles[index]), cluster.expected(1, *batches[index]))


def test_a_channel_whose_buffers_were_all_set_aside_is_opened_anew():
    with split_cluster() as cluster:
        cluster.hosts[A].max_frames = 2
        router = cluster.router(limits=replace(LIMITS, step_timeout_s=0.1))
        join(router, cluster.map())
        cluster.hosts[A].faults.lose_answer = lambda sequence, attempt: True
        for _ in range(2):
            with pytest.raises(ExpertsUnavailable):
                step(router, cluster)
        cluster.hosts[A].faults.lose_answer = lambda sequence, attempt: False
        step(router, cluster)
        assert len(cluster.hosts[A].channels) == 2


def test_a_batch_too_large_for_a_buffer_goes_in_pieces():
    with split_cluster() as cluster:
        router = cluster.router()
        sizes = []

        def open_small(host_key, endpoint):
            channel = cluster.open_channel(host_key, endpoint)
            send = channel.send

            def send_if_it_fits(sequence, attempt, request) -> None:
                if len(request.hidden) > 3:
                    raise FrameError("too large")
                sizes.append(len(request.hidden))
                send(sequence, attempt, request)

            channel.send = send_if_it_fits
            return channel

        router._links._open_channel = open_small
        join(router, cluster.map())
        step(router, cluster, num_tokens=11)
        assert len(sizes) > 6


def test_what_no_channel_can_carry_is_an_error_at_once():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        hidden, routing = make_batch(3, 6, 2, dtype=torch.float64)
        with pytest.raises(FrameError, match="float64"):
            router.combine(router.dispatch(1, hidden, routing))
        step(router, cluster)


def test_an_abandoned_batch_leaves_nothing_behind():
    with split_cluster() as cluster:
        router = cluster.router()
        join(router, cluster.map())
        step(router, cluster)
        handle = router.dispatch(1, *make_batch(4, 6, 3))
        router.abandon(handle)
        router.abandon(handle)
        assert router.adopt(cluster.map(n=2))
        assert router.acknowledged == MapVersion(1, 2)
        step(router, cluster)


# -- the map


def test_nothing_works_before_the_first_map():
    with split_cluster() as cluster:
        router = cluster.router()
        assert router.acknowledged is None
        with pytest.raises(ExpertsUnavailable, match="no placement map"):
            router.dispatch(1, *make_batch(1, 6, 2))


def test_older_maps_and_maps_that_uncover_a_reachable_expert_are_refused():
    with split_cluster() as cluster:
        router = cluster.router()
        assert router.adopt(cluster.map(n=5, epoch=2))
        assert router.adopt(cluster.map(n=5, epoch=2))
        assert not router.adopt(cluster.map(n=4, epoch=2))
        assert not router.adopt(cluster.map(n=9, epoch=1))
        only_b = make_map({B: cluster.hosts[B].slots.held()}, n=6, epoch=2)
        assert not router.adopt(only_b)
        assert router.acknowledged == MapVersion(2, 5)
        step(router, cluster)
        cluster.hosts[A].die()
        routing = Routing(torch.tensor([[1, 3]]), torch.ones(1, 2))  # b's alone: a's end is met in passing
        wait_until(lambda: router.combine(router.dispatch(1, torch.ones(1, HIDDEN), routing)) is not None and A in router.suspects)
        assert router.adopt(only_b)
        assert router.suspects == frozenset()


def test_channels_follow_the_map():
    with replicated_cluster() as cluster:
        router = cluster.router()
        router.adopt(make_map({A: cluster.experts}, n=1))
        step(router, cluster)
        router.adopt(make_map({A: cluster.experts, B: cluster.experts}, n=2))
        wait_until(lambda: len(cluster.hosts[B].channels) == 1)
        handle = router.dispatch(1, *make_batch(4, 6, 3))
        router.adopt(make_map({B: cluster.experts}, n=3))
        assert router.acknowledged == MapVersion(1, 2)
        (channel,) = cluster.hosts[A].channels
        assert not channel._is_closed  # it still owes an answer
        router.combine(handle)
        assert channel._is_closed
        assert router.acknowledged == MapVersion(1, 3)
        num_frames = len(cluster.hosts[A].frames)
        step(router, cluster)
        assert len(cluster.hosts[A].frames) == num_frames


def test_a_channel_that_opens_too_late_is_closed():
    with replicated_cluster() as cluster:
        router = cluster.router()
        may_open = threading.Event()
        opened = []

        def open_slowly(host_key, endpoint):
            assert may_open.wait(10)
            opened.append(cluster.open_channel(host_key, endpoint))
            return opened[-1]

        router._links._open_channel = open_slowly
        router.adopt(cluster.map())
        router.close()
        may_open.set()
        wait_until(lambda: len(opened) == 2 and all(channel._is_closed for channel in opened))


def test_defaults_wait_longer_for_a_step_than_for_anything_in_it():
    limits = DispatchLimits()
    assert limits.max_backoff_s < limits.resend_after_s < limits.step_timeout_s


# -- real channels


@pytest.mark.parametrize("router_node", ["node-1", "node-2"], ids=["shared-memory", "tcp"])
def test_over_real_channels(router_node: str):
    """Two routers, three hosts, both kinds of frames; then a host goes and its replacement takes over."""
    secret = b"a secret of at least sixteen bytes"
    cluster = Cluster(9)
    listeners = {}

    def start(host, experts) -> None:
        cluster.add_host(host, experts)
        listeners[host] = Listener(secret=secret, application="app", node_id="node-1", on_frame=cluster.hosts[host].server.on_frame)

    def published(n: int):
        held = {host: cluster.hosts[host].slots.held() for host in listeners}
        return replace(make_map(held, n=n), hosts={host: listener.endpoint for host, listener in listeners.items()})

    def open_channel(_host, endpoint):
        return connect(endpoint, router_node, secret, "app")

    for index, host in enumerate((A, B, C)):
        start(host, [expert for expert in cluster.experts if expert.expert % 3 == index])
    latest = published(1)
    limits = replace(LIMITS, decode_tokens=8)
    with cluster:
        routers = [DistributedExperts(open_channel, lambda: latest, limits) for _ in range(2)]
        try:
            for router in routers:
                join(router, latest)
            for seed, num_tokens in enumerate((1, 5, 300, 2)):
                batch = make_batch(num_tokens, 9, 4, seed)
                handles = [(router, router.dispatch(3, *batch)) for router in routers for _ in range(2)]
                for router, handle in handles:
                    assert_close(router.combine(handle), cluster.expected(3, *batch))
            gone = sorted(cluster.hosts[A].slots.held())
            listeners.pop(A).close()
            start(key("d"), gone)
            latest = published(2)
            for seed, router in enumerate(routers):
                step(router, cluster, seed=seed)
                assert router.acknowledged == MapVersion(1, 2)
        finally:
            for router in routers:
                router.close()
            for listener in listeners.values():
                listener.close()
