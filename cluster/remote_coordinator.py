"""The Coordinator behind its Serve handle, as the front door calls it: each call with a deadline, its own errors as they are."""

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayTaskError

from cluster.api.errors import CoordinatorAway
from cluster.errors import ClusterError


class RemoteCoordinator:
    """`handle` is the Coordinator deployment's. See cluster.api.control.CoordinatorCalls."""

    def __init__(self, handle: Any, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def view(self) -> Mapping[str, Any]:
        """See Coordinator.view."""
        return await self._call("view")

    async def metrics(self) -> bytes:
        """See CoordinatorReplica.metrics."""
        return bytes(await self._ask("metrics"))

    async def rebalance(self) -> Mapping[str, Any]:
        """See Coordinator.rebalance."""
        return await self._call("rebalance")

    async def drain(self, host_id: str) -> Mapping[str, Any]:
        """See Coordinator.drain."""
        return await self._call("drain", host_id)

    async def set_scaling(self, bounds: Mapping[str, Mapping[str, float]]) -> Mapping[str, Any]:
        """See Coordinator.set_scaling."""
        return await self._call("set_scaling", bounds)

    async def operation(self, operation_id: str) -> Mapping[str, Any]:
        """See Coordinator.operation."""
        return await self._call("operation", operation_id)

    async def _call(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await self._ask(method, *arguments)
        return answer

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """CoordinatorAway while it does not answer, which concerns nobody who asks for tokens."""
        response: Any = None
        try:
            response = getattr(self._handle, method).remote(*arguments)
            async with asyncio.timeout(self._timeout_s):
                answer = await response
        except Exception as error:  # whatever Serve raises for a replica that is restarting
            own = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(own, ClusterError):
                raise own from None
            if response is not None and isinstance(error, TimeoutError):
                response.cancel()  # so that an outage leaves no backlog
            raise CoordinatorAway("The coordinator does not answer; it may be restarting. Ask again: nothing is done twice.") from error
        return answer
