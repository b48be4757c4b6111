"""A rendered RayService, by the names its rules speak of."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


@dataclass(frozen=True)
class Group:
    """The head's group is called `headgroup`, as KubeRay labels it."""

    name: str
    spec: dict[str, Any]

    @property
    def start_params(self) -> dict[str, Any]:
        return self.spec.get("rayStartParams") or {}

    @property
    def resources(self) -> dict[str, Any]:
        return self.spec.get("resources") or {}

    @property
    def pod(self) -> dict[str, Any]:
        return self.spec["template"]["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.spec["template"].get("metadata", {}).get("labels") or {}

    @property
    def container(self) -> dict[str, Any]:
        """Ray's: the first."""
        return self.pod["containers"][0]

    @property
    def environment(self) -> dict[str, Any]:
        return {variable["name"]: variable.get("value") for variable in self.container.get("env") or []}


@dataclass(frozen=True)
class RayService:
    one: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        return self.one["spec"]

    @property
    def annotations(self) -> dict[str, str]:
        return self.one["metadata"].get("annotations") or {}

    @property
    def cluster(self) -> dict[str, Any]:
        return self.spec["rayClusterConfig"]

    @property
    def head(self) -> Group:
        return Group("headgroup", self.cluster["headGroupSpec"])

    @property
    def workers(self) -> list[Group]:
        return [Group(group["groupName"], group) for group in self.cluster.get("workerGroupSpecs") or []]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    @property
    def has_autoscaler_v2(self) -> bool:
        options = self.cluster.get("autoscalerOptions") or {}
        return bool(self.cluster.get("enableInTreeAutoscaling")) and options.get("version") == "v2"

    @property
    def serve_config(self) -> dict[str, Any]:
        return yaml.safe_load(self.spec["serveConfigV2"])

    @property
    def settings(self) -> dict[str, Any]:
        """Shoal's own."""
        return self.serve_config["applications"][0]["args"]


def quantity(text: str | float) -> float:
    """Of Kubernetes: "500m" is 0.5, "2Gi" 2 x 2^30."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()
    return float(number) * UNITS[unit]


def version(text: str) -> tuple[int, ...]:
    """Raises ValueError for what is none."""
    return tuple(int(part) for part in text.split("."))
