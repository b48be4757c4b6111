"""An operator's hands, whichever protocol they come by: look at the cluster, rebalance, drain, set bounds, follow."""

from collections.abc import Mapping
from typing import Any, Protocol

from cluster.api.scaling_bounds import ScalingBounds, bounds_in_force, checked_bounds
from cluster.config import AutoscalingSettings

Operation = Mapping[str, Any]  # id, kind, target, state, detail, started_unix_s, ended_unix_s


class CoordinatorCalls(Protocol):
    """The way to the Coordinator. Answers are plain values; every call ends within a deadline of its own.

    Raises CoordinatorAway, or the Coordinator's own errors: UnknownHost, UnknownOperation, BadBounds, Outranked.
    """

    async def view(self) -> Mapping[str, Any]:
        """See Coordinator.view."""
        ...

    async def metrics(self) -> bytes:
        """See CoordinatorReplica.metrics."""
        ...

    async def rebalance(self) -> Operation:
        """See Coordinator.rebalance."""
        ...

    async def drain(self, host_id: str) -> Operation:
        """See Coordinator.drain."""
        ...

    async def set_scaling(self, bounds: Mapping[str, Mapping[str, float]]) -> Operation:
        """See Coordinator.set_scaling."""
        ...

    async def operation(self, operation_id: str) -> Operation:
        """See Coordinator.operation."""
        ...


class ClusterControl:
    """`autoscaling` is the configuration that bounds are held against; None where it is not known."""

    def __init__(self, coordinator: CoordinatorCalls, autoscaling: AutoscalingSettings | None = None) -> None:
        self._coordinator = coordinator
        self._autoscaling = autoscaling

    async def view(self) -> dict[str, Any]:
        """The Coordinator's view, with the bounds of scaling as they hold."""
        view = await self._coordinator.view()
        return {**view, "scaling": bounds_in_force(view["scaling"], self._autoscaling)}

    async def metrics(self) -> bytes:
        """The application's metrics in Prometheus' text format."""
        return await self._coordinator.metrics()

    async def rebalance(self) -> Operation:
        """The operation, which may have been under way already."""
        return await self._coordinator.rebalance()

    async def drain(self, host_id: str) -> Operation:
        """The operation, which may have been under way already. Raises UnknownHost."""
        return await self._coordinator.drain(host_id)

    async def set_scaling(self, wanted: ScalingBounds) -> Operation:
        """The operation, which may have been under way already. Raises InvalidRequest naming the field."""
        return await self._coordinator.set_scaling(checked_bounds(wanted, self._autoscaling))

    async def operation(self, operation_id: str) -> Operation:
        """What has become of it. Raises UnknownOperation."""
        return await self._coordinator.operation(operation_id)
