"""No overlay breaks a rule of KubeRay's operator, and each rule is broken by an example here."""

import pytest

from tests.k8s import operator_rules
from tests.k8s.changes import REMOVED, changed
from tests.k8s.operator_rules import RULES
from tests.k8s.ray_service import RayService
from tests.k8s.rendering import OVERLAYS, only, overlay

CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
EXPERTS = f"{CLUSTER}.workerGroupSpecs.1"
HEAD_ENVIRONMENT = f"{HEAD}.template.spec.containers.0.env.-"
NOTES = "metadata.annotations"
INCREMENTAL = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {"gatewayClassName": "g", "intervalSeconds": 10, "stepSizePercent": 5, "maxSurgePercent": 40},
}


def variable(name, value="1"):
    return {"name": name, "value": value}


def upgrade(**options):
    return INCREMENTAL | {"clusterUpgradeOptions": INCREMENTAL["clusterUpgradeOptions"] | options}


# Rule, what the rule says, and what breaks it.
EXAMPLES = [
    ("name_fits", "more than 47", {"metadata.name": "s" * 48}),
    ("name_fits", "no DNS label", {"metadata.name": "2shoal"}),
    ("initializing_timeout_is_a_duration", "no positive duration", {f"{NOTES}.ray\\io/initializing-timeout": "soon"}),
    ("initializing_timeout_is_a_duration", "no positive duration", {f"{NOTES}.ray\\io/initializing-timeout": "0s"}),
    ("every_group_has_a_container", "experts has no container", {f"{EXPERTS}.template.spec.containers": []}),
    ("replicas_are_ordered", "minReplicas 9 above maxReplicas", {f"{EXPERTS}.minReplicas": 9}),
    ("replicas_are_ordered", "negative number", {f"{EXPERTS}.minReplicas": -1}),
    ("replicas_are_ordered", "without the autoscaler", {f"{CLUSTER}.enableInTreeAutoscaling": False, f"{EXPERTS}.maxReplicas": REMOVED}),
    ("resources_are_said_once", "experts has resources and rayStartParams ['num-cpus']", {f"{EXPERTS}.rayStartParams": {"num-cpus": "0"}}),
    ("resources_are_said_once", "headgroup", {f"{HEAD}.resources": {"CPU": "0"}}),
    ("labels_are_labels", "rayStartParams", {f"{EXPERTS}.rayStartParams": {"labels": "a=b"}}),
    ("labels_are_labels", "pool=not this", {f"{EXPERTS}.labels": {"pool": "not this"}}),
    ("labels_are_labels", "-pool=", {f"{HEAD}.labels": {"-pool": "a"}}),
    ("idle_timeouts_have_their_autoscaler", "negative idleTimeoutSeconds", {f"{EXPERTS}.idleTimeoutSeconds": -1}),
    (
        "idle_timeouts_have_their_autoscaler",
        "autoscalerOptions.idleTimeoutSeconds is negative",
        {f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds": -1},
    ),
    ("idle_timeouts_have_their_autoscaler", "without autoscaler v2", {f"{CLUSTER}.autoscalerOptions.version": "v1"}),
    ("priorities_have_their_autoscaler", "priority without", {f"{EXPERTS}.priority": 1, f"{CLUSTER}.rayVersion": "2.55.1"}),
    ("priorities_have_their_autoscaler", "priority without", {f"{EXPERTS}.priority": 1, f"{CLUSTER}.autoscalerOptions.version": "v1"}),
    ("fault_tolerance_is_said_once", "ray.io/ft-enabled", {f"{NOTES}.ray\\io/ft-enabled": "true"}),
    ("fault_tolerance_is_said_once", "external-storage-namespace", {f"{NOTES}.ray\\io/external-storage-namespace": "n"}),
    ("fault_tolerance_is_said_once", "redis-password", {f"{HEAD}.rayStartParams.redis-password": "p"}),
    ("fault_tolerance_is_said_once", "and REDIS_PASSWORD", {HEAD_ENVIRONMENT: variable("REDIS_PASSWORD")}),
    ("fault_tolerance_is_said_once", "and RAY_REDIS_ADDRESS", {HEAD_ENVIRONMENT: variable("RAY_REDIS_ADDRESS")}),
    (
        "fault_tolerance_is_said_once",
        "without gcsFaultToleranceOptions",
        {f"{CLUSTER}.gcsFaultToleranceOptions": REMOVED, HEAD_ENVIRONMENT: variable("RAY_REDIS_ADDRESS")},
    ),
    ("fault_tolerance_is_said_once", "user name", {HEAD_ENVIRONMENT: variable("REDIS_USERNAME")}),
    ("fault_tolerance_is_said_once", "user name", {f"{HEAD}.rayStartParams.redis-username": "u"}),
    ("fault_tolerance_is_said_once", "feature gate", {f"{CLUSTER}.gcsFaultToleranceOptions.backend": "rocksdb"}),
    ("fault_tolerance_is_said_once", "storage", {f"{CLUSTER}.gcsFaultToleranceOptions.storage": {"size": "1Gi"}}),
    ("autoscaler_is_said_once", "and autoscalerOptions.version", {HEAD_ENVIRONMENT: variable("RAY_enable_autoscaler_v2")}),
    (
        "autoscaler_is_said_once",
        "without enableInTreeAutoscaling",
        {f"{CLUSTER}.enableInTreeAutoscaling": False, HEAD_ENVIRONMENT: variable("RAY_enable_autoscaler_v2")},
    ),
    ("autoscaler_is_said_once", "operator's own", {f"{CLUSTER}.autoscalerOptions.env": [variable("KUBERAY_GEN_AUTOSCALER_START_CMD")]}),
    ("groups_are_not_suspended", "experts is suspended", {f"{EXPERTS}.suspend": True}),
    ("pods_do_not_restart", "headgroup has restartPolicy Always", {f"{HEAD}.template.spec.restartPolicy": "Always"}),
    ("pods_do_not_restart", "experts has restartPolicy OnFailure", {f"{EXPERTS}.template.spec.restartPolicy": "OnFailure"}),
    ("token_authentication_has_its_ray", "2.52.0", {f"{CLUSTER}.rayVersion": "2.51.0"}),
    ("token_authentication_has_its_ray", "2.52.0", {f"{CLUSTER}.rayVersion": "nightly"}),
    ("token_authentication_has_its_ray", "enableK8sTokenAuth", {f"{CLUSTER}.authOptions.enableK8sTokenAuth": True}),
    ("gates_are_closed", "networkPolicy", {f"{CLUSTER}.networkPolicy": {"mode": "DenyAll"}}),
    ("gates_are_closed", "tlsOptions", {f"{CLUSTER}.tlsOptions": {"enabled": True}}),
    ("head_service_has_no_name", "name", {f"{HEAD}.headService": {"metadata": {"name": "mine"}}}),
    ("upgrade_is_one_there_is", "RollingUpdate", {"spec.upgradeStrategy.type": "RollingUpdate"}),
    ("upgrade_is_one_there_is", "negative", {"spec.rayClusterDeletionDelaySeconds": -1}),
    ("upgrade_is_one_there_is", "RayCluster of one's own", {f"{CLUSTER}.upgradeStrategy": {"type": "Recreate"}}),
    ("upgrade_is_one_there_is", "needs the autoscaler", {"spec.upgradeStrategy": INCREMENTAL, f"{CLUSTER}.enableInTreeAutoscaling": False}),
    ("upgrade_is_one_there_is", "needs clusterUpgradeOptions", {"spec.upgradeStrategy": {"type": INCREMENTAL["type"]}}),
    ("upgrade_is_one_there_is", "stepSizePercent 50", {"spec.upgradeStrategy": upgrade(stepSizePercent=50)}),
    ("upgrade_is_one_there_is", "intervalSeconds", {"spec.upgradeStrategy": upgrade(intervalSeconds=0)}),
    ("upgrade_is_one_there_is", "gatewayClassName", {"spec.upgradeStrategy": upgrade(gatewayClassName="")}),
    ("image_is_of_that_ray", "not one of Ray 2.61.0", {f"{CLUSTER}.rayVersion": "2.61.0"}),
    ("image_is_of_that_ray", "shoal:latest", {f"{EXPERTS}.template.spec.initContainers.0.image": "shoal:latest"}),
    ("image_is_of_that_ray", "several images", {f"{EXPERTS}.template.spec.containers.0.image": "other:1-ray2.60.0"}),
    ("serve_config_is_one", "no application", {"spec.serveConfigV2": "applications: []"}),
    ("quantities_are_numbers", "'two'", {f"{EXPERTS}.resources.shoal_expert_host": "two"}),
]


def broken(name, service):
    return list(getattr(operator_rules, name)(service))


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("rule", RULES, ids=lambda one: one.__name__)
def test_an_overlay_breaks_no_rule(rule, name):
    assert list(rule(RayService(only(overlay(name), "RayService")))) == []


@pytest.mark.parametrize(("rule", "said", "changes"), EXAMPLES, ids=lambda one: one if isinstance(one, str) else "")
def test_a_rule_is_broken(rule, said, changes):
    one = only(overlay("cpu-demo"), "RayService")
    for path, value in changes.items():
        one = changed(one, path, value)
    complaints = broken(rule, RayService(one))
    assert complaints
    assert all(said in complaint for complaint in complaints)


def test_an_incremental_upgrade_is_possible():
    one = changed(only(overlay("cpu-demo"), "RayService"), "spec.upgradeStrategy", INCREMENTAL)
    assert broken("upgrade_is_one_there_is", RayService(one)) == []


def test_every_rule_has_an_example():
    assert {rule.__name__ for rule in RULES} == {name for name, _, _ in EXAMPLES}
