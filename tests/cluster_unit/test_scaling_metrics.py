"""What replicas tell the autoscaler, on made-up sums and a made-up clock."""

import pytest

from actors.scaling_metrics import SharedSums, host_metrics, router_metrics


def test_a_hosts_busy_share_mean_wait_and_slots():
    stats = {"busy_s": 0.25, "queue_wait_s": 0.6, "num_frames": 3.0}
    metrics = host_metrics(stats, 0.5, 12, 80, {"scaling_max": 4.0}, expert_bytes=10, bytes_limit=700)
    assert metrics == pytest.approx({"busy": 0.5, "queue_wait_s": 0.2, "slots": 70.0, "ready": 12.0, "scaling_max": 4.0})


def test_what_is_not_known_is_left_out():
    assert host_metrics({}, 0.0, 0, None, {}) == {"ready": 0.0}
    assert "queue_wait_s" not in host_metrics({"busy_s": 0.0, "num_frames": 0.0}, 1.0, 1, None, {})
    assert router_metrics({"kv_use": 0.5}, {}) == {"kv_use": 0.5}


def test_a_call_that_ended_in_this_interval_but_began_before_counts_as_all_of_it():
    assert host_metrics({"busy_s": 3.0}, 0.5, 1, None, {})["busy"] == 1.0


def test_a_routers_metrics():
    load = {"kv_use": 0.5, "num_running": 3.0, "num_waiting": 1.0, "num_steps": 9.0}
    metrics = router_metrics(load, {"scaling_min": 1.0}, busy_s=0.25, interval_s=0.5)
    assert metrics == {"kv_use": 0.5, "num_running": 3.0, "num_waiting": 1.0, "busy": 0.5, "scaling_min": 1.0}


def test_two_readers_each_get_all_of_the_sums_and_the_last_of_the_readings():
    taken = iter([{"busy_s": 1.0, "queued_tokens": 5.0}, {"busy_s": 2.0, "queued_tokens": 3.0}, {"busy_s": 4.0, "queued_tokens": 0.0}])
    now = iter([10.0, 11.0, 12.5, 14.0])
    sums = SharedSums(lambda: next(taken), lambda: next(now))
    assert sums.take("report") == ({"busy_s": 1.0, "queued_tokens": 5.0}, 1.0)
    assert sums.take("scaling") == ({"busy_s": 3.0, "queued_tokens": 3.0}, 2.5)
    assert sums.take("report") == ({"busy_s": 6.0, "queued_tokens": 0.0}, 3.0)
