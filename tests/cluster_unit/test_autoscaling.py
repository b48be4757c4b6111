"""Policies on made-up loads and a made-up clock; then through Serve's own wrapper and context."""

import json
import queue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster import autoscaling_serve
from cluster.autoscaling import (
    Bounds,
    Decision,
    Fleet,
    History,
    HostLoad,
    HostTargets,
    Limit,
    Pace,
    RouterLoad,
    RouterTargets,
    Signal,
    decide,
    effective_bounds,
    gateway_signals,
    host_floor,
    host_signals,
    router_signals,
)
from cluster.autoscaling_serve import ScalingPolicy, autoscaling_config
from cluster.config import AutoscalingSettings, GatewayScalingSettings, HostScalingSettings, RouterScalingSettings
from cluster.scaling_board import Board

PACE = Pace(reaction_s=1.0, cooldown_s=60.0, headroom=0.1, tolerance=0.1)
BOUNDS = Bounds(1, 10)


def need(replicas: float) -> tuple[Signal, ...]:
    return (Signal("busy", replicas, "made up"),)


class Clock:
    """Calls `decide` once a second and obeys it; every replica runs and reports at once."""

    def __init__(self, target: int, bounds: Bounds = BOUNDS) -> None:
        self.now_s, self.target, self.bounds, self.history = 0.0, target, bounds, History()

    def run(self, seconds: int, replicas: float) -> list[int]:
        return [self.step(need(replicas)).replicas for _ in range(seconds)]

    def step(self, signals: tuple[Signal, ...], missing: int = 0) -> Decision:
        fleet = Fleet(self.target, self.target, self.target - missing)
        decision = decide(signals, fleet, self.bounds, PACE, self.history, self.now_s)
        self.now_s, self.target, self.history = self.now_s + 1, decision.replicas, decision.history
        return decision


def test_a_need_is_met_after_the_reaction_time_and_at_once_in_full():
    assert Clock(2).run(3, 3.4) == [2, 4, 4]


def test_a_need_that_passes_within_the_reaction_time_adds_nothing():
    clock = Clock(2)
    assert clock.run(1, 4.0) + clock.run(1, 2.0) + clock.run(1, 4.0) == [2, 2, 2]


def test_a_need_within_the_tolerance_adds_nothing():
    assert Clock(2).run(5, 2.19) == [2] * 5
    assert Clock(2).run(5, 2.21)[-1] == 3


def test_replicas_go_only_after_a_whole_cooldown_without_need():
    clock = Clock(4)
    assert set(clock.run(59, 1.0)) == {4}
    clock.run(1, 3.0)
    assert set(clock.run(60, 1.0)) == {4}  # 3.0 with the headroom is a need of four
    assert clock.run(20, 1.0)[-1] == 2


def test_going_down_keeps_the_headroom():
    clock = Clock(6)
    assert clock.run(80, 2.0)[-1] == 3


def test_after_a_restart_nothing_goes_before_a_cooldown_was_watched():
    clock = Clock(5)
    clock.run(70, 1.0)
    forgetful = Clock(5)
    assert clock.target == 2
    assert set(forgetful.run(60, 1.0)) == {5}


def test_without_any_report_nothing_changes():
    clock = Clock(3)
    decisions = [clock.step(()) for _ in range(200)]
    assert {decision.replicas for decision in decisions} == {3}
    assert "no replica has reported" in decisions[-1].reason


def test_while_one_replica_is_silent_nothing_goes_but_more_may_come():
    clock = Clock(3)
    assert {clock.step(need(1.0), missing=1).replicas for _ in range(200)} == {3}
    assert clock.step(need(5.0), missing=1).replicas == 3
    assert clock.step(need(5.0), missing=1).replicas == 5


def test_replicas_that_start_are_not_asked_for_twice():
    """Two busy hosts ask for four; while the new two start, the two that report ask for the same four."""
    loads = [HostLoad(busy=1.0, queue_wait_s=1.0)] * 2
    history, target = History(), 2
    for second in range(20):
        decision = decide(host_signals(loads, HostTargets()), Fleet(target, 2, 2), Bounds(1, 10), PACE, history, float(second))
        history, target = decision.history, decision.replicas
    assert target == 4


def test_a_need_above_max_names_it_at_once():
    decision = Clock(2, Bounds(1, 3)).step(need(7.5))
    assert (decision.limit, decision.wanted) == (Limit.MAX, 8)
    assert "wants 8, but max is 3" in decision.reason


def test_a_floor_above_max_gives_way_and_names_itself():
    decision = Clock(2, Bounds(1, 3, floor=5)).step(need(0.5))
    assert (decision.replicas, decision.limit, decision.wanted) == (3, Limit.FLOOR_ABOVE_MAX, 5)
    assert "5 must run whatever the load, but max is 3" in decision.reason


def test_bounds_moved_at_run_time_hold_at_once():
    assert Clock(2, Bounds(4, 6)).step(need(1.0)).replicas == 4
    narrowed = Clock(9, Bounds(1, 6)).step(need(1.0))
    assert (narrowed.replicas, narrowed.limit) == (6, None)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 3), st.floats(0, 100)), min_size=1, max_size=60),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 9),
)
def test_never_outside_the_bounds_and_never_below_what_the_load_needs(steps, low, span, floor):
    bounds, now_s, history, target = Bounds(low, low + span, floor), 0.0, History(), low
    for load, missing, pause_s in steps:
        now_s += pause_s
        decision = decide(need(load), Fleet(target, target, max(0, target - missing)), bounds, PACE, history, now_s)
        assert bounds.min <= decision.replicas <= bounds.max
        assert decision.replicas >= min(max(low, floor), bounds.max)
        if decision.replicas < target:
            assert decision.replicas >= min(load, bounds.max)
            assert missing == 0
        assert len(decision.history.peaks) <= 11
        target = decision.replicas
        history = History.from_dict(json.loads(json.dumps(decision.history.as_dict())))
        assert history == decision.history


def test_hosts_scale_on_busy_time_and_on_the_queue_whichever_asks_more():
    targets = HostTargets(busy=0.5, queue_wait_s=0.1, max_growth=2.0)
    busy, wait = host_signals([HostLoad(0.9, 0.05), HostLoad(0.6, 0.05)], targets)
    assert (busy.need, wait.need) == (pytest.approx(3.0), pytest.approx(1.0))
    assert host_signals([HostLoad(0.9, 9.0), HostLoad(0.6, 9.0)], targets)[1].need == 4.0


def test_a_host_that_still_loads_does_not_count_as_one_that_queues():
    loading = HostLoad(0.0, 0.0, is_serving=False)
    assert host_signals([HostLoad(1.0, 0.1), loading], HostTargets(queue_wait_s=0.1))[1].need == 1.0


def test_routers_scale_on_cache_busy_time_and_waiting_tokens():
    targets = RouterTargets(kv_use=0.5, waiting_tokens=1000, num_waiting=2, busy=0.8, max_growth=3.0)
    by_name = {
        signal.name: signal.need for signal in router_signals([RouterLoad(0.9, 500, 9, 0.4), RouterLoad(0.3, 2500, 9, 0.4)], targets)
    }
    assert by_name == {"kv_use": pytest.approx(2.4), "busy": pytest.approx(1.0), "waiting_tokens": pytest.approx(3.0)}
    assert router_signals([RouterLoad(num_waiting=3.0)], targets) == (Signal("num_waiting", 1.5, "3 of 2"),)
    assert router_signals([RouterLoad()], targets) == ()


def test_gateways_scale_on_open_requests():
    assert gateway_signals(450, 200.0)[0].need == 2.25


@pytest.mark.parametrize(
    ("experts", "replicas", "slots", "floor"),
    [(1664, 1, [1000.0], 3), (1664, 2, [1000.0, 2000.0], 5), (1664, 1, [None], 2), (8, 3, [100.0], 4), (8, 2, [], 3), (0, 1, [], 0)],
)
def test_the_floor_fits_all_experts_and_one_host_more(experts, replicas, slots, floor):
    assert host_floor(experts, replicas, slots) == floor


def test_run_time_bounds_of_the_newest_order_count_within_serves_own():
    told = [{"scaling_version": 1.0, "scaling_max": 3.0}, {"scaling_version": 2.0, "scaling_max": 7.0, "scaling_min": 2.0}, {}]
    assert effective_bounds(Bounds(1, 4), told, Bounds(1, 16)) == Bounds(2, 7)
    assert effective_bounds(Bounds(1, 4), told, Bounds(1, 5)) == Bounds(2, 5)
    assert effective_bounds(Bounds(1, 4, floor=2), [{"scaling_floor": 3.0}, {}], Bounds(1, 16)) == Bounds(1, 4, 3)
    assert effective_bounds(Bounds(2, 4), [{"scaling_min": 0.0}], Bounds(2, 16)).min == 2


SETTINGS = AutoscalingSettings(
    expert_host=HostScalingSettings(min_replicas=2, max_replicas=4, reaction_s=0.5),
    router=RouterScalingSettings(max_replicas=3),
    gateway=GatewayScalingSettings(max_replicas=2),
)


def context(metrics, target=2, now_s=100.0, state=None, requests=0.0, low=2, high=16):
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="d",
        app_name="a",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=None,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now_s,
        config=AutoscalingConfig(min_replicas=low, max_replicas=high, upscale_delay_s=0, downscale_delay_s=0),
    )


def policy_of(role, **options):
    config = autoscaling_config(SETTINGS, role, 2, **options)
    return ScalingPolicy(**config["policy"]["policy_kwargs"]), AutoscalingConfig(**config)


def test_serve_takes_the_settings_and_rebuilds_the_policy_from_them():
    _, config = policy_of("expert_host", num_experts=100, min_replicas_per_expert=1)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 2, 16)
    rebuilt = cloudpickle.loads(config.policy.get_serialized_policy_def())(**config.policy.policy_kwargs)
    assert rebuilt(context({"busy": {"a": 0.1, "b": 0.1}}))[0] == 2
    assert autoscaling_config(AutoscalingSettings(), "router", 1) is None


def test_through_serves_wrapper_hosts_go_from_two_to_four_and_the_state_survives():
    policy, _ = policy_of("expert_host")
    wrapped = _apply_autoscaling_config(policy)
    hot = {"busy": {"a": 1.0, "b": 1.0}, "queue_wait_s": {"a": 2.0, "b": 2.0}, "ready": {"a": 8.0, "b": 8.0}}
    first, state = wrapped(context(hot))
    again, _ = wrapped(context(hot, now_s=100.5, state=state))
    assert (first, again) == (2, 4)
    idle = {"busy": {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}}
    replicas = 4
    for second in range(90):
        replicas, state = wrapped(context(idle, target=replicas, now_s=101.0 + second, state=state))
    assert replicas == 2


def test_a_replica_that_has_pushed_only_serves_own_metric_is_no_information():
    policy, _ = policy_of("expert_host")
    decision = policy.decide(context({"ongoing_requests": {"a": 0.0, "b": 0.0}}))
    assert decision.replicas == 2
    assert "no replica has reported" in decision.reason


def test_hosts_never_fewer_than_hold_all_experts():
    policy, _ = policy_of("expert_host", num_experts=100, min_replicas_per_expert=1)
    assert policy.decide(context({"busy": {"a": 0.0, "b": 0.0}, "slots": {"a": 50.0, "b": 60.0}})).replicas == 3


def test_gateways_and_routers_read_their_own_metrics():
    policy, _ = policy_of("gateway")
    assert policy.decide(context({}, requests=900.0)).limit is Limit.MAX
    router, _ = policy_of("router")
    assert router.decide(context({"kv_use": {"a": 0.9, "b": 0.9}}, low=1)).wanted == 3


def test_an_error_of_ours_changes_nothing_and_is_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(autoscaling_serve.logger, "exception", lambda form, *arguments: told.append(form % arguments))
    policy, _ = policy_of("expert_host")
    state = {"kept": 1}
    for _ in range(2):
        assert policy(context({"busy": {"a": None}}, target=3, state=state)) == (3, state)
    assert len(told) == 1
    assert "expert_host failed" in told[0]


def test_a_limit_is_logged_once_and_named(monkeypatch):
    lines = []
    monkeypatch.setattr(autoscaling_serve.logger, "warning", lambda form, *arguments: lines.append(form % arguments))
    policy, _ = policy_of("expert_host")
    for _ in range(3):
        policy(context({"busy": {name: 1.0 for name in "abcd"}}, target=4))
    assert len(lines) == 1
    assert "limited by max" in lines[0]


def test_what_a_policy_does_is_written_where_the_coordinator_reads_it():
    written = queue.SimpleQueue()

    class Boards:
        def put(self, key, value):
            written.put((key, Board.from_bytes(value)))

        def get(self, key):
            raise AssertionError("a policy never reads")

    config = autoscaling_config(SETTINGS, "expert_host", 2, application="app")
    policy = ScalingPolicy(**config["policy"]["policy_kwargs"], boards=Boards())
    hot = {"busy": {"a": 1.0, "b": 1.0}, "ready": {"a": 8.0, "b": 8.0}}
    _, state = policy(context(hot))
    replicas, state = policy(context(hot, now_s=100.5, state=state))
    assert replicas == 4
    policy(context(hot, now_s=100.6, state=state))  # Serve asks again before it has begun
    boards = [written.get(timeout=10) for _ in range(2)]
    assert {key for key, _ in boards} == {"app/expert_host"}
    assert boards[-1][1].counts == {("up", "busy"): 1}
    assert written.empty()


def test_bounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match="must hold"):
        HostScalingSettings(min_replicas=5, max_replicas=4)
