"""What the production overlay promises beyond the others. A rule takes all objects of an overlay."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from tests.k8s.deployment_rules import Objects, Rule, group, pods, ray_service
from tests.k8s.rendering import only

POD_KINDS = ("head", "routers", "experts", "redis")
RULES: list[Rule] = []


def rule(one: Rule) -> Rule:
    RULES.append(one)
    return one


@rule
def pods_get_what_they_may_take(objects: Objects) -> Iterator[str]:
    """Requests equal limits: the last to be evicted, and no neighbour slows them."""
    for where, pod in pods(objects):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            resources = container.get("resources") or {}
            if not {"cpu", "memory"} <= resources.get("limits", {}).keys() or resources.get("requests") != resources["limits"]:
                yield f"{where}: container {container['name']} has other limits than requests"
    sidecar = ray_service(objects).cluster["autoscalerOptions"]["resources"]
    if sidecar["requests"] != sidecar["limits"]:
        yield "the autoscaler has other limits than requests"


@rule
def drains_leave_enough(objects: Objects) -> Iterator[str]:
    """A budget over pods of a RayCluster counts only as a number: there is no scale subresource to take a share of."""
    budgets = [one for one in objects if one["kind"] == "PodDisruptionBudget"]
    for name in ("routers", "experts"):
        one = group(objects, name)
        of_group = [budget["spec"] for budget in budgets if selects(budget["spec"]["selector"], one.labels)]
        if len(of_group) != 1:
            yield f"group {name} has {len(of_group)} disruption budgets"
        elif type(of_group[0].get("minAvailable")) is not int:
            yield f"the disruption budget of group {name} is no minAvailable that is a number"
        elif not 0 < of_group[0]["minAvailable"] < one.spec["minReplicas"]:
            yield f"the disruption budget of group {name} lets no pod go, or all"
        elif of_group[0].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"a pod of group {name} that is not ready holds up every drain of its node"


@rule
def replicas_land_apart(objects: Objects) -> Iterator[str]:
    if ray_service(objects).settings["placement"]["min_replicas"] < 2:
        yield "an expert may stand alone"
    for name in ("routers", "experts"):
        one = group(objects, name)
        spreads = [
            spread
            for spread in one.pod.get("topologySpreadConstraints") or []
            if spread["topologyKey"] == "kubernetes.io/hostname" and spread["whenUnsatisfiable"] == "DoNotSchedule"
        ]
        if not any(selects(spread["labelSelector"], one.labels) and spread.get("minDomains", 1) >= 2 for spread in spreads):
            yield f"group {name} may share one machine"


@rule
def nobody_comes_in_unasked(objects: Objects) -> Iterator[str]:
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    for kind in POD_KINDS:
        labels = labels_of(objects, kind)
        if not any(
            selects(policy["podSelector"], labels) and "Ingress" in policy["policyTypes"] and not policy.get("ingress")
            for policy in policies
        ):
            yield f"{kind} pods are open to everybody where nothing else is said"
    for policy in policies:
        for opened in policy.get("ingress") or []:
            if not opened.get("from"):
                yield f"the policy over {policy['podSelector']} lets everybody in"
            if not opened.get("ports") and any("namespaceSelector" in peer for peer in opened.get("from") or []):
                yield f"the policy over {policy['podSelector']} opens all ports to other namespaces"


@rule
def policies_name_ports_that_are_there(objects: Objects) -> Iterator[str]:
    for one in objects:
        if one["kind"] != "NetworkPolicy":
            continue
        covered = [kind for kind in POD_KINDS if selects(one["spec"]["podSelector"], labels_of(objects, kind))]
        if not covered:
            yield f"{one['metadata']['name']} covers no pod"
        for opened in one["spec"].get("ingress") or []:
            for port in opened.get("ports") or []:
                for kind in covered:
                    if port["port"] not in ports_of(objects, kind):
                        yield f"{one['metadata']['name']}: {kind} pods have no port {port['port']}"


@rule
def names_are_found(objects: Objects) -> Iterator[str]:
    """DNS may answer from an address that no selector knows (NodeLocal DNSCache, GKE's Cloud DNS)."""
    for one in objects:
        if one["kind"] != "NetworkPolicy" or "Egress" not in one["spec"]["policyTypes"]:
            continue
        open_to_all = [port for opened in one["spec"].get("egress") or [] if not opened.get("to") for port in opened.get("ports") or []]
        for protocol in ("UDP", "TCP"):
            if {"port": 53, "protocol": protocol} not in open_to_all:
                yield f"{one['metadata']['name']} drops DNS over {protocol} to some resolvers"


@rule
def routes_lead_to_the_service(objects: Objects) -> Iterator[str]:
    ports = {port["port"]: port["name"] for port in only(objects, "Service", "shoal")["spec"]["ports"]}
    for kind, port_name in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        for step in only(objects, kind)["spec"]["rules"]:
            for backend in step["backendRefs"]:
                if backend["name"] != "shoal" or ports.get(backend["port"]) != port_name:
                    yield f"{kind} leads to {backend['name']}:{backend['port']}"


@rule
def host_names_are_apart_and_have_tls(objects: Objects) -> Iterator[str]:
    """Gateway API refuses a GRPCRoute with a host name that an HTTPRoute on the same listener has."""
    listeners = {listener["name"]: listener for listener in only(objects, "Gateway")["spec"]["listeners"]}
    routes = [one for one in objects if one["kind"] in ("HTTPRoute", "GRPCRoute")]
    for one in routes:
        listener = listeners.get(one["spec"]["parentRefs"][0].get("sectionName"), {})
        if listener.get("protocol") != "HTTPS" or not listener.get("tls", {}).get("certificateRefs"):
            yield f"{one['kind']} has no listener with TLS"
        elif one["spec"]["hostnames"] != [listener["hostname"]]:
            yield f"{one['kind']} has other host names than its listener"
    for one, other in combinations(routes, 2):
        if set(one["spec"]["hostnames"]) & set(other["spec"]["hostnames"]):
            yield f"{one['kind']} and {other['kind']} share a host name"


@rule
def answers_last_through_the_gateway(objects: Objects) -> Iterator[str]:
    """Envoy cuts what lasts 15 s where nothing else is said, and a GRPCRoute has no field to say it."""
    longest_s = ray_service(objects).settings["gateway"]["max_timeout_s"]
    for one in objects:
        if one["kind"] == "HTTPRoute":
            for step in one["spec"]["rules"]:
                if not _lasts(step.get("timeouts", {}).get("request"), longest_s):
                    yield f"HTTPRoute {one['metadata']['name']} cuts answers that may last {longest_s:g} s"
    for kind, policy, field in (
        ("GRPCRoute", "BackendTrafficPolicy", "requestTimeout"),
        ("Gateway", "ClientTrafficPolicy", "streamIdleTimeout"),
    ):
        for one in objects:
            if one["kind"] == kind:
                said = [
                    other["spec"]["timeout"]["http"].get(field) for other in objects if other["kind"] == policy and _is_over(other, one)
                ]
                if len(said) != 1 or not _lasts(said[0], longest_s):
                    yield f"{kind} {one['metadata']['name']} has no {policy} that lets answers last {longest_s:g} s"


def _is_over(policy: dict[str, Any], one: dict[str, Any]) -> bool:
    whole = {"group": one["apiVersion"].partition("/")[0], "kind": one["kind"], "name": one["metadata"]["name"]}
    return whole in policy["spec"]["targetRefs"]


def _lasts(duration: str | None, longest_s: float) -> bool:
    """Whether a bound in seconds, such as 90s, is none (0s) or long enough."""
    return duration is not None and (float(duration.removesuffix("s")) or longest_s) >= longest_s


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def labels_of(objects: Objects, kind: str) -> dict[str, str]:
    """Of a pod as it runs: KubeRay adds some of its own."""
    if kind == "redis":
        labels: dict[str, str] = only(objects, "StatefulSet", "shoal-redis")["spec"]["template"]["metadata"]["labels"]
        return labels
    one = group(objects, "headgroup" if kind == "head" else kind)
    return one.labels | {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head" if kind == "head" else "worker", "ray.io/group": one.name}


def ports_of(objects: Objects, kind: str) -> set[str]:
    if kind == "redis":
        container = only(objects, "StatefulSet", "shoal-redis")["spec"]["template"]["spec"]["containers"][0]
    else:
        container = group(objects, "headgroup" if kind == "head" else kind).container
    return {port["name"] for port in container["ports"]}
