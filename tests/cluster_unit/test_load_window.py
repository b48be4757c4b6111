"""Windows of load against the sum they stand for, on a made-up clock."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.exchange import HostReport
from cluster.load_window import DecayingWindow, LoadWindows, balancedness, sampling_errors
from model.logical_expert import LogicalExpert
from router.placement_map import Endpoint, HostKey

steps = st.lists(st.tuples(st.floats(0, 400), st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000), max_size=3)), max_size=40)


@given(st.sampled_from([1.0, 5.0, 60.0]), steps)
def test_a_count_weighs_less_the_older_it_is(window_s, counted):
    window, now, events = DecayingWindow(window_s, 0.0), 0.0, []
    for pause_s, counts in counted:
        now += pause_s
        window.add(counts, now)
        events.append((now, counts))
    covered_s = max(window_s * (1 - math.exp(-now / window_s)), 1e-3 * window_s)
    for name in "abc":
        total = sum(counts.get(name, 0) * math.exp((at - now) / window_s) for at, counts in events)
        # What has faded to nothing may be forgotten.
        assert window.rates(now).get(name, 0.0) == pytest.approx(total / covered_s, rel=1e-6, abs=1e-3)


def test_a_steady_rate_is_met_from_the_first_seconds_on_and_forgotten_after_a_few_windows():
    window, now = DecayingWindow(5.0, 100.0), 100.0
    for second in range(1, 60):
        now = 100.0 + second
        window.add({"x": 40}, now)
        if second > 2:
            assert window.rates(now)["x"] == pytest.approx(40, rel=0.25)
    assert window.rates(now + 5.0)["x"] < 0.4 * window.rates(now)["x"]
    assert window.rates(now + 50.0)["x"] < 0.01


def test_the_long_window_remembers_what_the_short_one_has_forgotten():
    loads, expert = LoadWindows(5.0, 60.0, 0.0), LogicalExpert(1, 2)
    for second in range(1, 121):
        loads.add_tokens({expert: 10}, float(second))
    assert loads.num_tokens == {expert: 1200}
    assert loads.experts_short.rates(140.0)[expert] < 0.3
    assert loads.experts_long.rates(140.0)[expert] > 5.0


def test_restored_rates_stand_until_they_decay():
    window = DecayingWindow(60.0, 500.0)
    window.restore({"x": 7.0}, 500.0)
    assert window.rates(500.0)["x"] == pytest.approx(7.0)
    assert window.rates(560.0)["x"] == pytest.approx(7.0 / math.e)


def test_a_hosts_load():
    loads, key = LoadWindows(5.0, 60.0, 0.0), HostKey("a", 1)
    assert loads.host_loads((key,), 1.0)[key] == {"tokens_per_s": 0.0, "busy_share": 0.0, "wait_s": 0.0}
    for second in range(1, 60):
        stats = {"busy_s": 0.4, "queue_wait_s": 0.3, "num_frames": 30.0, "num_tokens": 600.0}
        report = HostReport(key, Endpoint("n", "a", "", 0), second, frozenset(), stats=stats)
        loads.add_host(report, float(second))
    load = loads.host_loads((key,), 59.0)[key]
    assert load["wait_s"] == pytest.approx(0.01)
    assert load["tokens_per_s"] == pytest.approx(600, rel=0.15)
    assert load["busy_share"] == pytest.approx(0.4, rel=0.15)


def test_balancedness():
    a, b = HostKey("a", 1), HostKey("b", 1)
    assert balancedness({}, {}) is None
    assert balancedness({a: 0.0, b: 0.0}, {}) is None
    assert balancedness({a: 3.0, b: 1.0}, {}) == pytest.approx(2 / 3)
    assert balancedness({a: 3.0, b: 1.0}, {a: 3.0, b: 1.0}) == 1.0


def test_the_sampling_error_is_how_far_shares_of_independent_choices_scatter():
    num_hosts, num_experts, per_s, window_s, num_runs = 4, 64, 50, 10.0, 2000
    draws = np.random.default_rng(3).poisson(per_s / num_experts, size=(num_runs, 60, num_experts))  # 60 seconds of each run
    decay = np.exp(-np.arange(60)[::-1] / window_s)
    of_hosts = (decay[:, None] * draws.reshape(num_runs, 60, num_hosts, -1).sum(axis=-1)).sum(axis=1)
    scatter = of_hosts.std() / of_hosts.mean()
    rates = {LogicalExpert(layer, expert): per_s / num_experts / layer for layer in (1, 9) for expert in range(num_experts)}
    errors = sampling_errors(rates, num_hosts, window_s)
    assert scatter == pytest.approx(errors[1], rel=0.05)
    assert errors[9] == pytest.approx(3 * errors[1])  # nine times fewer choices
    assert sampling_errors({}, num_hosts, window_s) == {}
    assert sampling_errors(rates, num_hosts, window_s, age_s=0.0) == {}
