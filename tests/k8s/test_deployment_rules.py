"""What must fit together fits in every overlay, and each rule is broken by an example here."""

import pytest
import yaml

from tests.k8s import deployment_rules, production_rules
from tests.k8s.changes import REMOVED, changed
from tests.k8s.rendering import OVERLAYS, overlay

CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
ROUTERS, EXPERTS = (f"{CLUSTER}.workerGroupSpecs.{number}" for number in (0, 1))
OF_ROUTER, OF_EXPERT = (f"{place}.template.spec.containers.0" for place in (ROUTERS, EXPERTS))
SHOAL, REDIS = ("Service", "shoal"), ("StatefulSet", "shoal-redis")
RAY = ("RayService", "shoal")
ENVOY_GRPC, ENVOY_IDLE = ("BackendTrafficPolicy", "shoal-grpc"), ("ClientTrafficPolicy", "shoal")
PLAIN = {"name": "grpc", "port": 9000, "targetPort": "serve-grpc"}


def settings(**changes):
    """A change of Shoal's own settings, `branch__key=value`."""
    return lambda one: _with_settings(one, {path.replace("__", "."): value for path, value in changes.items()})


def _with_settings(one, changes):
    config = yaml.safe_load(one["spec"]["serveConfigV2"])
    for path, value in changes.items():
        config["applications"][0]["args"] = changed(config["applications"][0]["args"], path, value)
    return changed(one, "spec.serveConfigV2", yaml.safe_dump(config))


# Rule, what it says, in which object, and what breaks it there.
EXAMPLES = [
    ("head_has_no_work", "more than nothing", RAY, {f"{HEAD}.rayStartParams.num-cpus": "4"}),
    ("only_hosts_go_to_expert_pods", "offer Ray CPUs", RAY, {f"{EXPERTS}.resources.CPU": "4"}),
    ("only_hosts_go_to_expert_pods", "gateway.cpus is 0", RAY, settings(gateway__cpus=0)),
    ("only_hosts_go_to_expert_pods", "expert_host.cpus", RAY, settings(expert_host__cpus=1)),
    ("roles_ask_for_their_pods", "router.resources", RAY, settings(router__resources={})),
    ("roles_ask_for_their_pods", "group experts offers no", RAY, {f"{EXPERTS}.resources.shoal_expert_host": REMOVED}),
    ("pods_have_room_for_the_bounds", "at most", RAY, {f"{EXPERTS}.maxReplicas": 5}),
    ("pods_have_room_for_the_bounds", "at least", RAY, {f"{EXPERTS}.minReplicas": 2}),
    ("gpus_suffice", "group routers has 1 GPUs, and what runs there wants 2", RAY, settings(router__gpus=2)),
    ("gpus_suffice", "wants 8", RAY, {f"{OF_EXPERT}.resources.limits.nvidia\\com/gpu": "4"}),
    ("pods_wait_for_their_replicas", "does not leave", RAY, {f"{OF_EXPERT}.lifecycle": REMOVED}),
    ("pods_wait_for_their_replicas", "may take 900 s", RAY, settings(gateway__drain_timeout_s=900)),
    ("pods_wait_for_their_replicas", "killed", RAY, {f"{ROUTERS}.template.spec.terminationGracePeriodSeconds": 30}),
    ("ports_are_those_of_serve", "headgroup", RAY, {f"{HEAD}.template.spec.containers.0.ports.3.containerPort": 8001}),
    ("clients_reach_routers", "selects expert pods", SHOAL, {"spec.selector": {"ray.io/serve": "true"}}),
    ("clients_reach_routers", "no router", SHOAL, {"spec.selector.tier": "front"}),
    ("clients_reach_routers", "h2c", SHOAL, {"spec.ports.1": PLAIN}),
    ("probes_ask_for_what_is_there", "expert pods", RAY, {f"{OF_EXPERT}.readinessProbe": REMOVED}),
    ("probes_ask_for_what_is_there", "router pods", RAY, {f"{OF_ROUTER}.readinessProbe.httpGet.path": "/api/healthz"}),
    ("models_are_there_and_stay_as_they_are", "may write", RAY, {f"{OF_EXPERT}.volumeMounts.0.readOnly": REMOVED}),
    ("models_are_there_and_stay_as_they_are", "without looking for Other", RAY, settings(model__path="/models/Other")),
    (
        "models_are_there_and_stay_as_they_are",
        "its log is gone",
        RAY,
        {f"{EXPERTS}.template.spec.initContainers.0.command": ["shoal-model-init"]},
    ),
    ("secrets_are_the_ones_there_are", "shoal-redis-password", RAY, {f"{CLUSTER}.authOptions.secretName": "shoal-redis-password"}),
    ("secrets_are_the_ones_there_are", "keys_file", RAY, settings(security__keys_file="/keys.yaml")),
    ("environment_is_the_same_everywhere", "group experts has not RAY_SERVE_ENABLE_HA_PROXY", RAY, {f"{OF_EXPERT}.env.0": REMOVED}),
    ("environment_is_the_same_everywhere", "another size", RAY, settings(gateway__max_body_bytes=1 << 20)),
    ("environment_is_the_same_everywhere", "cuts streams", RAY, settings(gateway__max_timeout_s=7200)),
    ("environment_is_the_same_everywhere", "fewer streams", RAY, settings(gateway__max_ongoing_requests=4000)),
    ("one_redis_keeps_both", "not both", RAY, {f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress": "elsewhere:6379"}),
    ("one_redis_keeps_both", "password", RAY, settings(state_store__redis_url="redis://:secret@shoal-redis:6379/1")),
    ("one_redis_keeps_both", "database 0", RAY, settings(state_store__redis_url="redis://shoal-redis:6379/0")),
    ("one_redis_keeps_both", "take over", RAY, {f"{CLUSTER}.gcsFaultToleranceOptions.externalStorageNamespace": "shoal"}),
    ("one_redis_keeps_both", "forgets", REDIS, {"spec.volumeClaimTemplates": REMOVED}),
    ("containers_are_contained", "as root", REDIS, {"spec.template.spec.securityContext.runAsNonRoot": REMOVED}),
    ("containers_are_contained", "without seccomp", RAY, {f"{EXPERTS}.template.spec.securityContext.seccompProfile": REMOVED}),
    (
        "containers_are_contained",
        "gain privileges",
        RAY,
        {f"{EXPERTS}.template.spec.initContainers.0.securityContext.capabilities": REMOVED},
    ),
    ("images_are_pinned", "has no version", REDIS, {"spec.template.spec.containers.0.image": "redis"}),
    ("pods_get_what_they_may_take", "other limits", RAY, {f"{OF_EXPERT}.resources.requests.cpu": "1"}),
    ("pods_get_what_they_may_take", "autoscaler", RAY, {f"{CLUSTER}.autoscalerOptions.resources.requests.cpu": "1m"}),
    ("drains_leave_enough", "is a number", ("PodDisruptionBudget", "shoal-experts"), {"spec.minAvailable": "50%"}),
    ("drains_leave_enough", "lets no pod go", ("PodDisruptionBudget", "shoal-experts"), {"spec.minAvailable": 3}),
    ("drains_leave_enough", "holds up", ("PodDisruptionBudget", "shoal-routers"), {"spec.unhealthyPodEvictionPolicy": REMOVED}),
    ("drains_leave_enough", "0 disruption budgets", ("PodDisruptionBudget", "shoal-routers"), {"spec.selector.matchLabels.a": "b"}),
    ("replicas_land_apart", "share one machine", RAY, {f"{EXPERTS}.template.spec.topologySpreadConstraints": REMOVED}),
    ("replicas_land_apart", "stand alone", RAY, settings(placement__min_replicas=1)),
    ("nobody_comes_in_unasked", "open to everybody", ("NetworkPolicy", "shoal-nobody"), {"spec.podSelector.matchLabels.a": "b"}),
    ("nobody_comes_in_unasked", "lets everybody in", ("NetworkPolicy", "shoal-redis"), {"spec.ingress.0.from": REMOVED}),
    ("nobody_comes_in_unasked", "all ports", ("NetworkPolicy", "shoal-clients"), {"spec.ingress.0.ports": REMOVED}),
    (
        "policies_name_ports_that_are_there",
        "no port gcs-server",
        ("NetworkPolicy", "shoal-operator"),
        {"spec.ingress.0.ports.0.port": "gcs-server"},
    ),
    (
        "policies_name_ports_that_are_there",
        "covers no pod",
        ("NetworkPolicy", "shoal-workers-out"),
        {"spec.podSelector.matchLabels.a": "b"},
    ),
    (
        "names_are_found",
        "drops DNS over UDP",
        ("NetworkPolicy", "shoal-workers-out"),
        {"spec.egress.1.to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}]},
    ),
    ("routes_lead_to_the_service", "shoal-serve-svc", ("GRPCRoute", "shoal"), {"spec.rules.0.backendRefs.0.name": "shoal-serve-svc"}),
    ("answers_last_through_the_gateway", "HTTPRoute shoal cuts", ("HTTPRoute", "shoal"), {"spec.rules.0.timeouts": REMOVED}),
    ("answers_last_through_the_gateway", "GRPCRoute shoal has no", ENVOY_GRPC, {"spec.targetRefs.0.name": "other"}),
    ("answers_last_through_the_gateway", "GRPCRoute shoal has no", ENVOY_GRPC, {"spec.timeout.http.requestTimeout": "15s"}),
    ("answers_last_through_the_gateway", "Gateway shoal has no", ENVOY_IDLE, {"spec.timeout.http": {}}),
    ("host_names_are_apart_and_have_tls", "share", ("GRPCRoute", "shoal"), {"spec.hostnames": ["shoal.example.com"]}),
    ("host_names_are_apart_and_have_tls", "no listener with TLS", ("Gateway", "shoal"), {"spec.listeners.0.protocol": "HTTP"}),
]


def broken(name, objects):
    rules = deployment_rules if hasattr(deployment_rules, name) else production_rules
    return list(getattr(rules, name)(objects))


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("rule", deployment_rules.RULES, ids=lambda one: one.__name__)
def test_an_overlay_breaks_no_rule(rule, name):
    assert list(rule(overlay(name))) == []


@pytest.mark.parametrize("rule", production_rules.RULES, ids=lambda one: one.__name__)
def test_production_keeps_its_promises(rule):
    assert list(rule(overlay("production"))) == []


@pytest.mark.parametrize(("rule", "said", "where", "changes"), EXAMPLES, ids=lambda one: one if isinstance(one, str) else "")
def test_a_rule_is_broken(rule, said, where, changes):
    objects = [_change(one, changes) if (one["kind"], one["metadata"]["name"]) == where else one for one in overlay("production")]
    complaints = broken(rule, objects)
    assert [one for one in complaints if said in one], complaints


def _change(one, changes):
    if callable(changes):
        return changes(one)
    for path, value in changes.items():
        one = changed(one, path, value)
    return one


def test_every_rule_has_an_example():
    assert {rule.__name__ for rule in [*deployment_rules.RULES, *production_rules.RULES]} == {name for name, *_ in EXAMPLES}
