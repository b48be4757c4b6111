"""Alerts and dashboard as files: they parse, name what there is to do, and agree with the manifests."""

import re
import subprocess
import sys

import pytest
import typer.main
import yaml

from cluster.api.errors import STATUSES
from cluster.cli import app as command_line
from cluster.metrics.catalogue import KNOWN
from tests.k8s.monitoring import MONITORING, added_labels, alerts, dashboard, pod_monitors, queries
from tests.k8s.promql import selectors
from tests.k8s.settings import is_setting, named_settings

SEVERITIES = {"critical", "warning", "info"}


def test_the_dashboard_is_what_its_script_prints():
    printed = subprocess.run([sys.executable, MONITORING / "dashboard.py"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert (MONITORING / "dashboard.json").read_text() == printed


def test_every_expression_parses_and_asks_for_our_series_only():
    for query in queries():
        assert query.selectors, query.place
        assert {one.name for one in query.selectors if not one.name.startswith("shoal_")} == set(), query.place


def test_selectors_tell_names_labels_and_values():
    (one, other) = selectors('sum by (host) (rate(shoal_a{kind="x"}[5m])) / on (host) shoal_b{kind=~"x|y"}')
    assert (one.name, one.labels, one.matchers) == ("shoal_a", {"host", "kind"}, (("kind", "=", "x"),))
    assert other.labels == {"host", "kind"}
    samples = [("shoal_a", {"host": "1", "kind": "x"}), ("shoal_b", {"host": "1", "kind": "x"})]
    assert one.is_found(samples, frozenset())
    assert not other.is_found(samples, frozenset()), "nothing has the kind y"
    assert not one.is_found([("shoal_a", {"kind": "x"})], frozenset()), "no label host"
    assert one.is_found([("shoal_a", {"kind": "x"})], frozenset({"host"}))
    with pytest.raises(ValueError, match="parenthesis"):
        selectors("sum by (host (shoal_a)")


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_what_to_do(alert):
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["annotations"]["summary"]
    runbook = alert["annotations"]["runbook"]
    assert len(runbook.split()) >= 12
    assert set(re.findall(r"\bShoal[A-Z]\w+", runbook)) <= {other["alert"] for other in alerts()}
    commands = typer.main.get_command(command_line).commands
    assert set(re.findall(r"(?<!rayservice )\bshoal ([a-z][a-z-]+)", runbook)) <= set(commands)
    for path in named_settings(runbook):
        assert is_setting(path), path
    titles = {panel["title"] for panel in dashboard()["panels"]}
    assert set(re.findall(r'"([^"]+)"', runbook)) <= titles


def test_names_of_settings_are_told_from_others():
    assert is_setting("autoscaling.expert_host.max_replicas")
    assert not is_setting("autoscaling.expert_host.most_replicas")
    assert not is_setting("placement.min_replicas.more")


def test_kinds_of_failure_that_begin_at_0_are_kinds_of_errors():
    assert set(KNOWN["request_failures_total"]) <= set(STATUSES)


def test_panels_lie_beside_each_other_and_have_numbers_of_their_own():
    panels = dashboard()["panels"]
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_alerts_keep_apart_two_clusters_of_one_model():
    """While one takes over from the other, a sum over both would hide that one has no router."""
    summed = [alert for alert in alerts() if " by " in alert["expr"]]
    assert len(summed) > 10
    for alert in summed:
        for one in selectors(alert["expr"]):
            assert {"namespace", "ray_cluster", "model_name"} <= one.labels, alert["alert"]
    assert "ray_cluster" in added_labels()


def test_what_is_scraped_is_there():
    """Shoal's series once for each cluster, through the head; Ray's on every pod."""
    cluster = yaml.safe_load((MONITORING.parent / "base" / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}
    for monitor, scraped in (("shoal", {"head"}), ("shoal-ray", set(groups))):
        spec = pod_monitors()[monitor]["spec"]
        (endpoint,) = spec["podMetricsEndpoints"]
        chosen = {name for name, group in groups.items() if spec["selector"]["matchLabels"].items() <= labels_of_pod(name, group).items()}
        assert chosen == scraped
        for name in chosen:
            ports = groups[name]["template"]["spec"]["containers"][0]["ports"]
            assert endpoint["port"] in {port["name"] for port in ports}


def labels_of_pod(name: str, group: dict) -> dict[str, str]:
    """Those of its template, and what KubeRay puts on it."""
    by_the_operator = {"ray.io/node-type": "head" if name == "head" else "worker", "ray.io/is-ray-node": "yes"}
    return {**group["template"]["metadata"]["labels"], **by_the_operator}
