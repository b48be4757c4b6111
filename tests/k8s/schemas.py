"""Whether objects are what their kind takes: complaints as sentences, none where all is well. Unknown fields are refused everywhere."""

import functools
import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.rendering import NODE_MODULES, missing
from tests.shared_data import shared_data

KUBERNETES = "1.29"  # the oldest that k8s/README.md names
NPM_GROUPS = ("gateway.networking.k8s.io", "monitoring.coreos.com")
ENVOY = "gateway.envoyproxy.io/v1alpha1"
# Envoy Gateway's CRDs are in no package: of its two kinds this is what we use, by its API reference.
ENVOY_TIMEOUTS = {"BackendTrafficPolicy": "requestTimeout", "ClientTrafficPolicy": "streamIdleTimeout"}
RAY_KINDS = {"RayService": "rayservices", "RayCluster": "rayclusters"}
TIMEOUT_S = 120.0


def complaints(objects: Sequence[dict[str, Any]]) -> list[str]:
    """Of all of them. Skips where a schema is not to be had."""
    by_npm = [one for one in objects if group(one) in NPM_GROUPS]
    others = [one for one in objects if group(one) not in NPM_GROUPS]
    found = [f"{name(one)}: {problem}" for one in others for problem in BY_GROUP.get(group(one), built_in)(one)]
    return found + ([] if not by_npm else npm(by_npm))


def group(one: dict[str, Any]) -> str:
    return one["apiVersion"].partition("/")[0]


def name(one: dict[str, Any]) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def built_in(one: dict[str, Any]) -> list[str]:
    """Against Kubernetes' own schemas, in their strict form."""
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def ray(one: dict[str, Any]) -> list[str]:
    """Against KubeRay's CRDs, refusing fields that they do not know, as an API server does that validates strictly."""
    validator = ray_validator(one["kind"], one["apiVersion"].partition("/")[2])
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(one)]


@functools.cache
def ray_validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    text = gzip.decompress((shared_data("kuberay_crds") / f"ray.io_{RAY_KINDS[kind]}.yaml.gz").read_bytes())
    crd = yaml.load(text, Loader=yaml.CSafeLoader)
    (found,) = (one for one in crd["spec"]["versions"] if one["name"] == version)
    schema = found["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "additionalProperties": True}
    for part in parts(schema):
        if "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
            part.setdefault("additionalProperties", False)
        if part.pop("x-kubernetes-int-or-string", False):
            part.pop("anyOf", None)
            part["type"] = ["integer", "string"]
        if part.pop("nullable", False):
            part["type"] = [part["type"], "null"]
    return jsonschema.Draft202012Validator(schema)


def envoy(one: dict[str, Any]) -> list[str]:
    """Against the little of Envoy Gateway's API that we use; other fields are unknown here."""
    if one["apiVersion"] != ENVOY or one["kind"] not in ENVOY_TIMEOUTS:
        return [f"{one['apiVersion']} has no {one['kind']}"]
    target = {name: {"type": "string"} for name in ("group", "kind", "name", "sectionName")}
    duration = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
    spec = exactly(
        targetRefs={"type": "array", "minItems": 1, "items": exactly(**target) | {"required": ["group", "kind", "name"]}},
        timeout=exactly(http=exactly(**{ENVOY_TIMEOUTS[one["kind"]]: duration})),
    )
    found = jsonschema.Draft202012Validator(spec | {"required": ["targetRefs"]}).iter_errors(one.get("spec"))
    return [f"spec.{'.'.join(map(str, error.path))}: {error.message}" for error in found]


def exactly(**properties: dict[str, Any]) -> dict[str, Any]:
    """A mapping of these and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it."""
    yield schema
    below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for part in below:
        if isinstance(part, dict):
            yield from parts(part)


def npm(objects: Sequence[dict[str, Any]]) -> list[str]:
    """Against the models that npm has of Gateway API and the Prometheus operator."""
    if not NODE_MODULES.is_dir() or shutil.which("node") is None:
        missing("the schemas of Gateway API and the Prometheus operator, or node, are not installed")
    checked = subprocess.run(
        ["node", "check.mjs"], cwd=NODE_MODULES.parent, input=json.dumps(objects), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    return [f"{name(one)}: {problem}" for one, problems in zip(objects, found, strict=True) for problem in problems]


BY_GROUP = {"ray.io": ray, "gateway.envoyproxy.io": envoy}
