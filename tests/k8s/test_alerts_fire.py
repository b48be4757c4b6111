"""Each alert fires on the fault that it is for, alone, and none on a healthy application: as Prometheus' own promtool evaluates them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.k8s.monitoring import MONITORING, alerts

PROMTOOL = shutil.which("promtool") or shutil.which(Path(sys.executable).with_name("promtool"))
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (`make install-dev` takes it from Debian)")

COMMON = 'namespace="shoal", ray_cluster="shoal-a", model_name="m", job="shoal/shoal", instance="shoal"'
MINUTES = 120
TTFT, QUEUED = "shoal_time_to_first_token_seconds_bucket", "shoal_request_queue_time_seconds_bucket"
# Values a minute: "7+0" stays at 7, "0+60" grows by one a second.
HEALTHY = {
    'shoal_members{role="gateway"}': "1+0",
    'shoal_members{role="router"}': "2+0",
    'shoal_members{role="expert_host"}': "3+0",
    "shoal_placement_experts": "100+0",
    "shoal_placement_experts_ready": "100+0",
    "shoal_placement_experts_standalone": "0+0",
    'shoal_request_success_total{finished_reason="stop"}': "0+60",
    'shoal_request_success_total{finished_reason="error"}': "0+0",
    'shoal_request_failures_total{kind="queue_full"}': "0+0",
    f'{TTFT}{{le="1"}}': "0+60",
    f'{TTFT}{{le="20"}}': "0+60",
    f'{TTFT}{{le="+Inf"}}': "0+60",
    f'{QUEUED}{{le="1"}}': "0+60",
    f'{QUEUED}{{le="20"}}': "0+60",
    f'{QUEUED}{{le="+Inf"}}': "0+60",
    'shoal_kv_cache_usage_perc{router="r1"}': "0.5+0",
    'shoal_kv_cache_usage_perc{router="r2"}': "0.99+0",
    "shoal_placement_map_version": "3+1",
    'shoal_router_map_version{router="r1"}': "3+1",
    'shoal_router_map_version{router="r2"}': "2+1",
    'shoal_member_events_total{event="router_lost"}': "0+0",
    'shoal_member_events_total{event="host_lost"}': "0+0",
    'shoal_host_suspected{host="h1"}': "0+0",
    'shoal_host_busy_ratio{host="h1"}': "0.95+0",
    'shoal_host_busy_ratio{host="h2"}': "0.5+0",
    'shoal_host_queue_wait_mean_seconds{host="h1"}': "0.02+0",
    "shoal_balancedness": "0.95+0",
    'shoal_dispatch_resends_total{reason="busy"}': "0+600",
    'shoal_dispatch_resends_total{reason="lost"}': "0+1",
    "shoal_dispatch_frames_total": "0+6000",
    "shoal_placement_map_epoch": "5+0",
    "shoal_placement_moves_total": "0+1",
}
# What is different when the alert is to fire; None: the series is gone.
FAULTS: dict[str, dict[str, str | None]] = {
    "ShoalNotWatched": dict.fromkeys(HEALTHY),
    "ShoalNoRouter": {'shoal_members{role="router"}': "0+0"},
    "ShoalExpertsMissing": {"shoal_placement_experts_ready": "99+0"},
    "ShoalAnswersFail": {'shoal_request_success_total{finished_reason="error"}': "0+2"},
    "ShoalRefusesRequests": {'shoal_request_failures_total{kind="queue_full"}': "0+30"},
    "ShoalFirstTokenSlow": {f'{TTFT}{{le="1"}}': "0+30"},
    "ShoalRequestsQueue": {f'{QUEUED}{{le="1"}}': "0+30"},
    "ShoalKvCacheFull": {'shoal_kv_cache_usage_perc{router="r1"}': "0.97+0"},
    "ShoalRouterBehind": {'shoal_router_map_version{router="r2"}': "2+0"},
    "ShoalRoutersLost": {'shoal_member_events_total{event="router_lost"}': "0+1"},
    "ShoalHostUnreachable": {'shoal_host_suspected{host="h1"}': "1+0"},
    "ShoalHostsLost": {'shoal_member_events_total{event="host_lost"}': "0+1"},
    "ShoalHostsSaturated": {'shoal_host_busy_ratio{host="h2"}': "0.9+0"},
    "ShoalHostQueueLong": {'shoal_host_queue_wait_mean_seconds{host="h1"}': "0.8+0"},
    "ShoalExpertsStandAlone": {"shoal_placement_experts_standalone": "4+0"},
    "ShoalUnbalanced": {"shoal_balancedness": "0.3+0"},
    "ShoalFailovers": {'shoal_dispatch_resends_total{reason="lost"}': "0+300"},
    "ShoalCoordinatorRestarts": {"shoal_placement_map_epoch": "5+1"},
    "ShoalExpertsRestless": {"shoal_placement_moves_total": "0+10"},
}


def scenario(name: str, changes: dict[str, str | None], firing: list[str]) -> dict:
    """One of promtool's: which alerts are firing after two hours."""
    series = {**HEALTHY, **changes}
    given = [
        {"series": labelled(name_and_labels), "values": f"{values}x{MINUTES}"}
        for name_and_labels, values in series.items()
        if values is not None
    ]
    expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "name": name,
        "interval": "1m",
        "input_series": given,
        "promql_expr_test": [{"expr": query, "eval_time": f"{MINUTES}m", "exp_samples": expected}],
    }


def labelled(series: str) -> str:
    name, _, labels = series.partition("{")
    return f"{name}{{{labels.rstrip('}') + ', ' if labels else ''}{COMMON}}}"


def test_every_alert_has_its_fault():
    assert set(FAULTS) == {alert["alert"] for alert in alerts()}


def test_alerts_fire_on_their_faults_and_on_nothing_else(tmp_path):
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    scenarios = [scenario("healthy", {}, []), *(scenario(alert, changes, [alert]) for alert, changes in FAULTS.items())]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": scenarios}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run([PROMTOOL, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_notices_an_alert_that_does_not_fire(tmp_path):
    rules = {"groups": [{"name": "g", "rules": [{"alert": "Never", "expr": "shoal_members > 9"}]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [scenario("n", {}, ["Never"])]}))
    done = subprocess.run([PROMTOOL, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
