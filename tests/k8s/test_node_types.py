"""Where Ray places what, by the overlays' own numbers: each role fits on its group of pods and on no other, and all of it fits."""

from dataclasses import replace

import pytest

from cluster.config import ShoalConfig
from cluster.layout import Group, first_misfit, groups
from tests.cluster.test_node_scaling import NODE_TYPES
from tests.k8s import ray_service, rendering

GROUP_OF = {"Router": "routers", "ExpertHost": "experts", "Gateway": "routers", "Coordinator": "routers"}


def service_of(overlay: str) -> ray_service.RayService:
    return ray_service.RayService(rendering.only(rendering.overlay(overlay), "RayService"))


def pod(group: ray_service.Group) -> dict[str, float]:
    """What Ray counts on one pod: the container's limits, under what the start parameters and the group say themselves."""
    limits = group.container["resources"]["limits"]
    counted = {name: limits[key] for name, key in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")) if key in limits}
    counted |= {"CPU": group.start_params["num-cpus"]} if "num-cpus" in group.start_params else {}
    return {name: ray_service.quantity(amount) for name, amount in (counted | group.resources).items()}


def roles(settings: ShoalConfig) -> tuple[Group, ...]:
    return groups(settings, settings.expert_host.replicas, on_gpu=settings.model.device == "cuda")


def fits(wanted: list[Group], nodes: list[dict[str, float]]) -> bool:
    return first_misfit(wanted, {str(number): node for number, node in enumerate(nodes)}) is None


@pytest.mark.parametrize("overlay", rendering.OVERLAYS)
def test_each_role_fits_on_its_group_of_pods_alone(overlay):
    service = service_of(overlay)
    for role in roles(ShoalConfig.model_validate(service.settings)):
        assert [group.name for group in service.groups if fits([replace(role, replicas=1)], [pod(group)])] == [GROUP_OF[role.deployment]]


def scaled(settings: ShoalConfig, bound: str) -> list[Group]:
    """The roles with as many replicas as that bound of theirs says: min_replicas or max_replicas."""
    bounds = {role.branch: getattr(settings.autoscaling, role.branch, None) for role in roles(settings)}
    return [replace(role, replicas=getattr(bounds[role.branch], bound)) if bounds[role.branch] else role for role in roles(settings)]


def pods(service: ray_service.RayService, bound: str, less: str | None = None) -> list[dict[str, float]]:
    """As many of each group as its minReplicas or maxReplicas says, one less of the group `less`."""
    return [pod(group) for group in service.workers for _ in range(group.spec[bound] - (group.name == less))]


@pytest.mark.parametrize("overlay", rendering.OVERLAYS)
def test_all_that_autoscaling_may_ask_for_fits_on_the_pods_there_may_be_and_needs_each(overlay):
    service = service_of(overlay)
    most = scaled(ShoalConfig.model_validate(service.settings), "max_replicas")
    assert fits(most, pods(service, "maxReplicas"))
    for group in service.workers:
        assert not fits(most, pods(service, "maxReplicas", less=group.name))


@pytest.mark.parametrize("overlay", rendering.OVERLAYS)
def test_what_always_runs_fits_on_the_pods_that_are_always_there(overlay):
    service = service_of(overlay)
    assert fits(scaled(ShoalConfig.model_validate(service.settings), "min_replicas"), pods(service, "minReplicas"))


def test_the_autoscaler_was_tried_with_the_demos_own_nodes():
    workers = {group.name: pod(group) for group in service_of("cpu-demo").workers}
    assert workers == {name: dict(kind.resources) for name, kind in NODE_TYPES.items()}
