"""Does the layout fit on the nodes that Ray has? Decided on numbers alone, since Serve would wait for ever for what does not exist."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import ShoalConfig
from cluster.errors import StartError

UNIT = 10_000  # Ray counts resources in ten-thousandths; whole numbers add up exactly
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """The replicas of one deployment: how many, and what Ray sets aside for each; `branch` is their place in the configuration."""

    deployment: str
    branch: str
    replicas: int
    needs: Resources


@dataclass(frozen=True)
class Choice:
    """cpu or cuda, and what the user should know about it."""

    device: str
    remark: str | None = None


def choose_device(config: ShoalConfig, num_hosts: int, total: Resources, free: Mapping[str, Resources]) -> Choice:
    """`auto` takes GPUs where there are enough, and says so if there are some but too few. Raises StartError where nothing fits."""
    wanted = config.model.device
    on_gpu = wanted == "cuda" or (wanted == "auto" and total.get("GPU", 0) > 0)
    problem = shortage(groups(config, num_hosts, on_gpu=on_gpu), total, free)
    if problem is None:
        return Choice("cuda" if on_gpu else "cpu")
    if wanted == "auto" and on_gpu:
        on_cpu = shortage(groups(config, num_hosts, on_gpu=False), total, free)
        if on_cpu is None:
            return Choice("cpu", f"on the CPU, as --device auto may: {problem}")
        problem = on_cpu  # with enough of that it would run
    raise StartError(problem)


def groups(config: ShoalConfig, num_hosts: int, *, on_gpu: bool) -> tuple[Group, ...]:
    """What the application asks of Ray. `num_hosts` is 0 for a dense model, whatever the configuration's default says."""
    router, host = config.router, config.expert_host
    return (
        Group("Router", "router", router.replicas, {**router.resources, "CPU": router.cpus, "GPU": on_gpu * router.gpus}),
        Group("ExpertHost", "expert_host", num_hosts, {**host.resources, "CPU": host.cpus, "GPU": on_gpu * host.gpus}),
        Group("Gateway", "gateway", config.gateway.replicas, {**config.gateway.resources, "CPU": config.gateway.cpus}),
        Group("Coordinator", "coordinator", 1, {**config.coordinator.resources, "CPU": config.coordinator.cpus}),
    )


def shortage(wanted: Sequence[Group], total: Resources, free: Mapping[str, Resources]) -> str | None:
    """None where everything fits; else a sentence that names what is missing and what to change.

    `total` is all that Ray has, used or not; `free` what each node has left, by node.
    """
    for resource in sorted({name for group in wanted for name in group.needs}):
        needed = sum(group.replicas * _units(group.needs.get(resource, 0)) for group in wanted)
        there = total.get(resource, 0)
        if needed > _units(there):
            what = f"{resource}s" if resource in ("CPU", "GPU") else f"of the resource {resource!r}"
            key = f"{resource.lower()}s" if resource in ("CPU", "GPU") else "resources"
            return (
                f"the layout needs {needed / UNIT:g} {what}, but Ray has {there:g}: "
                f"fewer --routers or --expert-hosts, or a smaller share each (router.{key}, expert_host.{key})"
            )
    misfit = first_misfit(wanted, free)
    if misfit is None:
        return None
    group, number = misfit
    share = ", ".join(f"{amount:g} {name}" for name, amount in group.needs.items() if amount)
    return (
        f"{group.deployment} {number} of {group.replicas} ({share}) fits on none of Ray's {len(free)} nodes, given what is free on each: "
        f"fewer --routers or --expert-hosts, a smaller share each ({group.branch}.cpus, {group.branch}.gpus), or end what else runs there"
    )


def first_misfit(wanted: Sequence[Group], free: Mapping[str, Resources]) -> tuple[Group, int] | None:
    """First fit, the hardest to place first. Returns the first replica that fits nowhere as its group and its number from 1."""
    nodes = [{name: _units(amount) for name, amount in resources.items()} for resources in free.values()]
    for group in sorted(wanted, key=_hardness, reverse=True):
        needs = {name: _units(amount) for name, amount in group.needs.items()}
        for number in range(1, group.replicas + 1):
            node = next((node for node in nodes if all(node.get(name, 0) >= amount for name, amount in needs.items())), None)
            if node is None:
                return group, number
            for name, amount in needs.items():
                if amount:
                    node[name] -= amount
    return None


def _hardness(group: Group) -> tuple[bool, float, float]:
    """Replicas bound to certain nodes go first, then the largest."""
    needs = dict(group.needs)
    gpus, cpus = needs.pop("GPU", 0), needs.pop("CPU", 0)
    return any(needs.values()), gpus, cpus


def _units(amount: float) -> int:
    return round(amount * UNIT)
