"""Every overlay, as kustomize renders it, is what an API server takes; and the check refuses what one would refuse."""

import copy

import pytest
import yaml

from tests.k8s.changes import REMOVED, changed
from tests.k8s.rendering import K8S, OVERLAYS, only, overlay, render
from tests.k8s.schemas import complaints

ROUTE = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "GRPCRoute",
    "metadata": {"name": "r"},
    "spec": {"rules": [{"backendRefs": [{"name": "shoal", "port": 9000}]}]},
}
MONITOR = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {"name": "m"},
    "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "metrics", "interval": "15s"}]},
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_what_its_kinds_take(name):
    assert complaints(overlay(name)) == []


def test_the_example_is_what_its_kinds_take():
    assert complaints(render(K8S / "example")) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("Service", ("spec", "prots"), [], "'prots' was unexpected"),
        ("StatefulSet", ("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "6379", "not of type 'integer'"),
        ("RayService", ("spec", "rayClusterConfig", "rayVersoin"), "2.60.0", "'rayVersoin' was unexpected"),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), "1", "not of type 'integer'"),
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "not of type 'string'"),
        (
            "RayService",
            ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "nodeSelektor"),
            {},
            "'nodeSelektor' was unexpected",
        ),
    ],
)
def test_what_an_api_server_refuses_is_refused(kind, path, value, said):
    one = copy.deepcopy(only(overlay("cpu-demo"), kind, "shoal-redis" if kind == "StatefulSet" else "shoal"))
    place = one
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    (complaint,) = complaints([one])
    assert said in complaint


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("kind", "BackendTrafikPolicy", "has no BackendTrafikPolicy"),
        ("spec.timeouts", {}, "'timeouts' was unexpected"),
        ("spec.timeout.http.requestTimeout", "for ever", "does not match"),
        ("spec.timeout.http.streamIdleTimeout", "1h", "'streamIdleTimeout' was unexpected"),
        ("spec.targetRefs.0.kind", REMOVED, "'kind' is a required property"),
        ("spec.targetRefs", REMOVED, "'targetRefs' is a required property"),
    ],
)
def test_policies_of_envoy_gateway(path, value, said):
    policy = only(overlay("production"), "BackendTrafficPolicy")
    assert complaints([policy]) == []
    (complaint,) = complaints([changed(policy, path, value)])
    assert said in complaint


def test_the_gateway_s_class_is_the_one_to_apply():
    made = yaml.safe_load((K8S / "components" / "envoy-gateway" / "class.yaml").read_text())
    assert complaints([made]) == []
    assert only(overlay("production"), "Gateway")["spec"]["gatewayClassName"] == made["metadata"]["name"]


def test_kinds_of_the_platform():
    unknown_field, bad_value, unknown_kind, bad_interval = (copy.deepcopy(one) for one in (ROUTE, ROUTE, ROUTE, MONITOR))
    unknown_field["spec"]["rules"][0]["backends"] = []
    bad_value["spec"]["rules"][0]["backendRefs"][0]["port"] = 99999
    unknown_kind["kind"] = "GRPCRout"
    bad_interval["spec"]["podMetricsEndpoints"][0]["interval"] = "a while"
    assert complaints([ROUTE, MONITOR]) == []
    found = complaints([unknown_field, bad_value, bad_interval])
    assert [said in complaint for said, complaint in zip(("'\"backends\"'", "port must be <= 65535", "interval"), found, strict=True)] == [
        True
    ] * 3
    assert any("GRPCRout" in complaint for complaint in complaints([unknown_kind]))
