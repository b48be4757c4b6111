"""What must fit together in a deployment of Shoal, which no schema and no operator looks at. A rule takes all objects of an overlay."""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from tests.k8s.ray_service import Group, RayService, quantity
from tests.k8s.rendering import only

Objects = Sequence[dict[str, Any]]
Rule = Callable[[Objects], Iterator[str]]
ROLES = (("router", "routers", "shoal_router"), ("expert_host", "experts", "shoal_expert_host"))
# By name, the keys that must be in it; k8s/secrets.sh makes them.
SECRETS = {"shoal-redis": "password", "shoal-secret": "secret", "shoal-ray-token": "auth_token", "shoal-api-keys": "keys.yaml"}
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": None,
    "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": None,
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": None,
    "RAY_worker_niceness": "0",
    "SHOAL_SECRET": None,
    "SHOAL_REDIS_PASSWORD": None,
}
RULES: list[Rule] = []


def rule(one: Rule) -> Rule:
    RULES.append(one)
    return one


def ray_service(objects: Objects) -> RayService:
    return RayService(only(objects, "RayService"))


def group(objects: Objects, name: str) -> Group:
    return next(group for group in ray_service(objects).groups if group.name == name)


@rule
def head_has_no_work(objects: Objects) -> Iterator[str]:
    head = ray_service(objects).head
    if head.start_params.get("num-cpus") != "0" or head.start_params.get("num-gpus") or head.resources:
        yield "the head offers Ray more than nothing"


@rule
def only_hosts_go_to_expert_pods(objects: Objects) -> Iterator[str]:
    """Whatever asks for a CPU would keep an expert pod that is otherwise idle."""
    if quantity(group(objects, "experts").resources.get("CPU", 1)) > 0:
        yield "expert pods offer Ray CPUs"
    settings = ray_service(objects).settings
    for name in ("router", "gateway", "coordinator"):
        if settings[name]["cpus"] <= 0:
            yield f"{name}.cpus is 0, so it may go to an expert pod, or to the head"
    if settings["expert_host"]["cpus"] > 0:
        yield "expert_host.cpus is above 0, which no expert pod offers"


@rule
def roles_ask_for_their_pods(objects: Objects) -> Iterator[str]:
    for branch, name, resource in ROLES:
        if ray_service(objects).settings[branch]["resources"] != {resource: 1}:
            yield f"{branch}.resources is not 1 of {resource}"
        if resource not in group(objects, name).resources:
            yield f"group {name} offers no {resource}"


@rule
def pods_have_room_for_the_bounds(objects: Objects) -> Iterator[str]:
    """Serve waits for ever for what no group can hold, and least replicas need pods that are there."""
    settings = ray_service(objects).settings
    for branch, name, resource in ROLES:
        one = group(objects, name)
        per_pod = int(quantity(one.resources.get(resource, 0)))
        bounds = settings["autoscaling"][branch]
        least = settings[branch]["replicas"] if bounds is None else bounds["min_replicas"]
        most = settings[branch]["replicas"] if bounds is None else bounds["max_replicas"]
        if one.spec["minReplicas"] * per_pod < least:
            yield f"group {name} has {one.spec['minReplicas']} x {per_pod} at least, and {branch} wants {least}"
        if one.spec["maxReplicas"] * per_pod < most:
            yield f"group {name} has {one.spec['maxReplicas']} x {per_pod} at most, and {branch} goes up to {most}"


@rule
def gpus_suffice(objects: Objects) -> Iterator[str]:
    settings = ray_service(objects).settings
    for branch, name, resource in ROLES:
        one = group(objects, name)
        wanted = settings[branch]["gpus"] * quantity(one.resources.get(resource, 0)) if settings["model"]["device"] == "cuda" else 0
        there = quantity(one.container["resources"]["limits"].get("nvidia.com/gpu", 0))
        if there != wanted:
            yield f"group {name} has {there:g} GPUs, and what runs there wants {wanted:g}"


@rule
def pods_wait_for_their_replicas(objects: Objects) -> Iterator[str]:
    service = ray_service(objects)
    drains = [service.settings[name]["drain_timeout_s"] for name in ("router", "gateway", "placement")]
    for one in service.workers:
        command = one.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[:2] != ["shoal", "leave-node"] or "--timeout-s" not in command:
            yield f"group {one.name} does not leave its node before it stops"
            continue
        waits = float(command[command.index("--timeout-s") + 1])
        if waits <= max(drains):
            yield f"group {one.name} waits {waits:g} s, and a replica may take {max(drains):g} s"
        if one.pod.get("terminationGracePeriodSeconds", 30) <= waits:
            yield f"group {one.name} is killed while it waits"


@rule
def ports_are_those_of_serve(objects: Objects) -> Iterator[str]:
    service = ray_service(objects)
    config = service.serve_config
    wanted = {"serve": config["http_options"]["port"], "serve-grpc": config["grpc_options"]["port"], "metrics": 8080}
    for one in service.groups:
        ports = {port["name"]: port["containerPort"] for port in one.container.get("ports", [])}
        if {name: ports.get(name) for name in wanted} != wanted:
            yield f"group {one.name} has the ports {ports}, not {wanted}"


@rule
def clients_reach_routers(objects: Objects) -> Iterator[str]:
    service = only(objects, "Service", "shoal")
    if not service["spec"]["selector"].items() <= (group(objects, "routers").labels | {"ray.io/serve": "true"}).items():
        yield "the Service selects no router pod"
    if service["spec"]["selector"].items() <= (group(objects, "experts").labels | {"ray.io/serve": "true"}).items():
        yield "the Service selects expert pods, where Serve's proxy is not always"
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    if ports["grpc"].get("appProtocol") != "kubernetes.io/h2c" or (ports["http"]["targetPort"], ports["grpc"]["targetPort"]) != (
        "serve",
        "serve-grpc",
    ):
        yield "the Service's ports are not http to serve, and grpc to serve-grpc as h2c"


@rule
def probes_ask_for_what_is_there(objects: Objects) -> Iterator[str]:
    """Without one of their own KubeRay asks Serve's proxy, which expert pods have only while they hold a replica."""
    routers, experts = (group(objects, name).container.get("readinessProbe", {}).get("httpGet", {}) for name in ("routers", "experts"))
    if (routers.get("path"), routers.get("port")) != ("/-/healthz", "serve"):
        yield "router pods are ready without their ingress"
    if (experts.get("path"), experts.get("port")) != ("/api/healthz", 52365):
        yield "expert pods are not asked for their raylet alone"


@rule
def models_are_there_and_stay_as_they_are(objects: Objects) -> Iterator[str]:
    service = ray_service(objects)
    directory, name = posixpath.split(service.settings["model"]["path"])
    for one in service.groups:
        mounts = {mount["mountPath"]: mount for mount in one.container.get("volumeMounts", [])}
        if not mounts.get(directory, {}).get("readOnly"):
            yield f"group {one.name} has no {directory}, or may write to it"
        words = " ".join(" ".join([*init["command"], *init.get("args", [])]) for init in one.pod.get("initContainers", []))
        if "shoal-model-init" not in words or name not in words.split():
            yield f"group {one.name} starts without looking for {name}"
        if "--wait" not in words.split():
            yield f"group {one.name} fails where {name} is not there yet: KubeRay makes a new pod at once, and its log is gone"


@rule
def secrets_are_the_ones_there_are(objects: Objects) -> Iterator[str]:
    for name, key in _secret_references(objects):
        if name not in SECRETS or key not in (SECRETS[name], None):
            yield f"nobody makes the Secret {name} with the key {key}"
    service = ray_service(objects)
    keys_file = service.settings["security"]["keys_file"]
    mounts = {mount["mountPath"]: mount["name"] for mount in group(objects, "routers").container["volumeMounts"]}
    if keys_file is None or mounts.get(posixpath.dirname(keys_file)) != "api-keys" or posixpath.basename(keys_file) != "keys.yaml":
        yield f"security.keys_file {keys_file} is not the Secret's"


@rule
def environment_is_the_same_everywhere(objects: Objects) -> Iterator[str]:
    for one in ray_service(objects).groups:
        for name, value in ENVIRONMENT.items():
            if name not in one.environment or value not in (None, one.environment[name]):
                yield f"group {one.name} has not {name}{'' if value is None else '=' + value}"
    settings = ray_service(objects).settings
    for one in ray_service(objects).groups:
        if one.environment.get("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE") not in (None, str(settings["gateway"]["max_body_bytes"])):
            yield f"group {one.name} bounds gRPC messages by another size than gateway.max_body_bytes"
        if float(one.environment.get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "inf")) < settings["gateway"]["max_timeout_s"]:
            yield f"group {one.name} cuts streams that may last gateway.max_timeout_s"
        if (
            float(one.environment.get("RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS", "inf"))
            < settings["gateway"]["max_ongoing_requests"]
        ):
            yield f"group {one.name} takes fewer streams of one connection than gateway.max_ongoing_requests"


@rule
def one_redis_keeps_both(objects: Objects) -> Iterator[str]:
    service = ray_service(objects)
    options = service.cluster.get("gcsFaultToleranceOptions") or {}
    url = urlsplit(service.settings["state_store"]["redis_url"] or "")
    redis = only(objects, "Service", "shoal-redis")
    address = f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    if options.get("redisAddress") != address or f"{url.hostname}:{url.port}" != address:
        yield f"Ray's and Shoal's Redis are not both {address}"
    if url.password is not None:
        yield "the password of Redis is in the Serve config"
    if url.path in ("", "/", "/0"):
        yield "Shoal's state lies among Ray's, in database 0"
    if options.get("externalStorageNamespace"):
        yield "externalStorageNamespace is set: a new cluster beside the old one would take over its state"
    if not only(objects, "StatefulSet", "shoal-redis")["spec"].get("volumeClaimTemplates"):
        yield "Redis forgets"


@rule
def containers_are_contained(objects: Objects) -> Iterator[str]:
    for where, pod in pods(objects):
        security = pod.get("securityContext") or {}
        if (
            not security.get("runAsNonRoot")
            or not security.get("runAsUser")
            or (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault"
        ):
            yield f"{where}: the pod may run as root, or without seccomp"
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            own = container.get("securityContext") or {}
            if own.get("allowPrivilegeEscalation") is not False or (own.get("capabilities") or {}).get("drop") != ["ALL"]:
                yield f"{where}: container {container['name']} may gain privileges"


@rule
def images_are_pinned(objects: Objects) -> Iterator[str]:
    for where, pod in pods(objects):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            if container["image"].rpartition(":")[2] in (container["image"], "latest"):
                yield f"{where}: the image {container['image']} has no version"


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's specification, and whose it is."""
    for one in objects:
        if one["kind"] in ("StatefulSet", "Deployment", "Job"):
            yield f"{one['kind']}/{one['metadata']['name']}", one["spec"]["template"]["spec"]
    for one in ray_service(objects).groups:
        yield f"group {one.name}", one.pod


def _secret_references(objects: Objects) -> Iterator[tuple[str, str | None]]:
    for _, pod in pods(objects):
        for volume in pod.get("volumes", []):
            if "secret" in volume:
                yield volume["secret"]["secretName"], None
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            for one in container.get("env") or []:
                reference = (one.get("valueFrom") or {}).get("secretKeyRef")
                if reference is not None:
                    yield reference["name"], reference["key"]
    cluster = ray_service(objects).cluster
    yield cluster["authOptions"]["secretName"], None
    password = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    yield password["name"], password["key"]
