"""What KubeRay's operator refuses although the CRD takes it: its ValidateRayServiceMetadata and ValidateRayServiceSpec, one rule each.

A rule takes a RayService and yields sentences. Feature gates are as KubeRay has them by default: off for all that is alpha.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.k8s.ray_service import RayService, quantity, version

Rule = Callable[[RayService], Iterator[str]]
# A cluster's name is the service's and a dash and five letters, and -serve-svc after it must still be a label of 63.
MAX_NAME = 63 - len("-serve-svc") - len("-abcde")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(h|m|s|ms))+|[0-9]+")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
RULES: list[Rule] = []


def rule(one: Rule) -> Rule:
    RULES.append(one)
    return one


@rule
def name_fits(service: RayService) -> Iterator[str]:
    name = service.one["metadata"]["name"]
    if len(name) > MAX_NAME:
        yield f"the name has {len(name)} characters, more than {MAX_NAME}"
    if not DNS_LABEL.fullmatch(name):
        yield f"the name {name!r} is no DNS label that begins with a letter"


@rule
def initializing_timeout_is_a_duration(service: RayService) -> Iterator[str]:
    given = service.annotations.get("ray.io/initializing-timeout")
    if given and (not DURATION.fullmatch(given) or not re.search("[1-9]", given)):
        yield f"ray.io/initializing-timeout is {given!r}, no positive duration"


@rule
def every_group_has_a_container(service: RayService) -> Iterator[str]:
    for group in service.groups:
        if not group.pod.get("containers"):
            yield f"group {group.name} has no container"


@rule
def replicas_are_ordered(service: RayService) -> Iterator[str]:
    for group in service.workers:
        least, most = group.spec.get("minReplicas"), group.spec.get("maxReplicas")
        if not service.cluster.get("enableInTreeAutoscaling") and None in (least, most):
            yield f"group {group.name} needs minReplicas and maxReplicas without the autoscaler"
        if min(least or 0, most or 0) < 0:
            yield f"group {group.name} has a negative number of replicas"
        if None not in (least, most) and least > most:
            yield f"group {group.name} has minReplicas {least} above maxReplicas {most}"


@rule
def resources_are_said_once(service: RayService) -> Iterator[str]:
    for group in service.groups:
        doubled = [name for name in ("num-cpus", "num-gpus", "memory", "resources") if group.start_params.get(name)]
        if doubled and group.resources:
            yield f"group {group.name} has resources and rayStartParams {doubled}"


@rule
def labels_are_labels(service: RayService) -> Iterator[str]:
    for group in service.groups:
        if "labels" in group.start_params:
            yield f"group {group.name} has labels in rayStartParams"
        for key, value in (group.spec.get("labels") or {}).items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                yield f"group {group.name} has the label {key}={value}, which is none"


@rule
def idle_timeouts_have_their_autoscaler(service: RayService) -> Iterator[str]:
    overall = (service.cluster.get("autoscalerOptions") or {}).get("idleTimeoutSeconds", 0)
    if overall < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    for group in service.workers:
        given = group.spec.get("idleTimeoutSeconds")
        if given is not None and given < 0:
            yield f"group {group.name} has a negative idleTimeoutSeconds"
        if given is not None and not service.has_autoscaler_v2:
            yield f"group {group.name} has idleTimeoutSeconds without autoscaler v2"


@rule
def priorities_have_their_autoscaler(service: RayService) -> Iterator[str]:
    for group in service.workers:
        if group.spec.get("priority") and (not service.has_autoscaler_v2 or not _ray_is(service, (2, 56, 0))):
            yield f"group {group.name} has a priority without autoscaler v2 and Ray 2.56"


@rule
def fault_tolerance_is_said_once(service: RayService) -> Iterator[str]:
    options, environment = service.cluster.get("gcsFaultToleranceOptions"), service.head.environment
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment and not service.annotations.get("ray.io/ft-enabled"):
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    else:
        if service.annotations.get("ray.io/ft-enabled"):
            yield "gcsFaultToleranceOptions and the annotation ray.io/ft-enabled"
        if service.annotations.get("ray.io/external-storage-namespace"):
            yield "gcsFaultToleranceOptions and the annotation ray.io/external-storage-namespace"
        if service.head.start_params.get("redis-password"):
            yield "gcsFaultToleranceOptions and redis-password in rayStartParams"
        for variable in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
            if variable in environment:
                yield f"gcsFaultToleranceOptions and {variable} in the head's environment"
        if options.get("backend", "redis") == "rocksdb":
            yield "the backend rocksdb needs a feature gate"
        elif options.get("storage") is not None:
            yield "storage is for the backend rocksdb"
    if service.head.start_params.get("redis-username") or "REDIS_USERNAME" in environment:
        yield "a Redis user name outside gcsFaultToleranceOptions"


@rule
def autoscaler_is_said_once(service: RayService) -> Iterator[str]:
    switch = service.head.environment.get(AUTOSCALER_V2)
    if not service.cluster.get("enableInTreeAutoscaling"):
        if switch in ("1", "true"):
            yield f"{AUTOSCALER_V2} without enableInTreeAutoscaling"
    elif switch is not None and (service.cluster.get("autoscalerOptions") or {}).get("version"):
        yield f"{AUTOSCALER_V2} and autoscalerOptions.version"
    sidecar = (service.cluster.get("autoscalerOptions") or {}).get("env") or []
    if any(variable["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for variable in sidecar):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's own"


@rule
def groups_are_not_suspended(service: RayService) -> Iterator[str]:
    for group in service.workers:
        if group.spec.get("suspend"):
            yield f"group {group.name} is suspended, which needs a feature gate and no autoscaler"


@rule
def pods_do_not_restart(service: RayService) -> Iterator[str]:
    for group in service.groups:
        if service.has_autoscaler_v2 and group.pod.get("restartPolicy", "Never") != "Never":
            yield f"group {group.name} has restartPolicy {group.pod['restartPolicy']} with autoscaler v2"


@rule
def token_authentication_has_its_ray(service: RayService) -> Iterator[str]:
    options = service.cluster.get("authOptions") or {}
    if options.get("mode") == "token" and not _ray_is(service, (2, 52, 0)):
        yield "authOptions.mode token needs rayVersion 2.52.0 or later"
    if options.get("enableK8sTokenAuth"):
        yield "a RayService cannot have enableK8sTokenAuth"


@rule
def gates_are_closed(service: RayService) -> Iterator[str]:
    for field in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if service.cluster.get(field) is not None:
            yield f"{field} needs a feature gate"


@rule
def head_service_has_no_name(service: RayService) -> Iterator[str]:
    if (service.cluster["headGroupSpec"].get("headService") or {}).get("metadata", {}).get("name"):
        yield "headService has a name"


@rule
def upgrade_is_one_there_is(service: RayService) -> Iterator[str]:
    if (service.spec.get("rayClusterDeletionDelaySeconds") or 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if service.cluster.get("upgradeStrategy") is not None:
        yield "rayClusterConfig.upgradeStrategy is for a RayCluster of one's own"
    upgrade: dict[str, Any] = service.spec.get("upgradeStrategy") or {}
    kind = upgrade.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type {kind} is none of {', '.join(UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(upgrade.get("clusterUpgradeOptions"), bool(service.cluster.get("enableInTreeAutoscaling")))


@rule
def image_is_of_that_ray(service: RayService) -> Iterator[str]:
    """The operator believes rayVersion; pods run what is in the image."""
    wanted = service.cluster.get("rayVersion", "")
    images = {
        container["image"] for group in service.groups for container in [*group.pod["containers"], *group.pod.get("initContainers", [])]
    }
    for image in sorted(images):
        found = re.search(r":.*\bray([0-9]+(\.[0-9]+)+)", image)
        if found is None or found.group(1) != wanted:
            yield f"the image {image} is not one of Ray {wanted}"
    if len({group.container["image"] for group in service.groups}) > 1:
        yield "head and workers have several images"


@rule
def serve_config_is_one(service: RayService) -> Iterator[str]:
    config = service.serve_config
    if not isinstance(config, dict) or not config.get("applications"):
        yield "serveConfigV2 names no application"


@rule
def quantities_are_numbers(service: RayService) -> Iterator[str]:
    """The operator leaves out a resource that it cannot read, with a line in its log."""
    for group in service.groups:
        for name, given in group.resources.items():
            try:
                quantity(given)
            except (AttributeError, KeyError):
                yield f"group {group.name} has {given!r} of {name}"


def _incremental(options: dict[str, Any] | None, autoscales: bool) -> Iterator[str]:
    if not autoscales:
        yield "an incremental upgrade needs the autoscaler"
    if options is None:
        yield "an incremental upgrade needs clusterUpgradeOptions"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= step <= surge <= 100:
        yield f"0 <= stepSizePercent {step} <= maxSurgePercent {surge} <= 100 must hold"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds must be above 0"
    if not options.get("gatewayClassName"):
        yield "an incremental upgrade needs gatewayClassName"


def _ray_is(service: RayService, least: tuple[int, ...]) -> bool:
    try:
        return version(service.cluster.get("rayVersion", "")) >= least
    except ValueError:
        return False
