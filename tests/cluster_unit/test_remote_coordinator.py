"""The Coordinator behind a Serve handle: whatever Serve does, an answer or an error of ours, in time."""

import asyncio

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.api.errors import CoordinatorAway
from cluster.operations import UnknownHost
from cluster.remote_coordinator import RemoteCoordinator


class Response:
    """Serve's DeploymentResponse: awaited once, told when nobody waits any more."""

    def __init__(self, outcome):
        self.outcome, self.is_cancelled = outcome, False

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self):
        if self.outcome is None:
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """Serve's handle: any attribute is a method with `remote`."""

    def __init__(self, outcome=None):
        self.outcome, self.calls, self.responses = outcome, [], []

    def __getattr__(self, method):
        class Method:
            @staticmethod
            def remote(*arguments):
                self.calls.append((method, *arguments))
                self.responses.append(Response(self.outcome))
                return self.responses[-1]

        return Method


async def test_each_call_reaches_its_method():
    handle = Handle({"id": "x"})
    coordinator = RemoteCoordinator(handle, 1.0)
    bounds = {"router": {"max_replicas": 2.0}}
    answers = [
        await coordinator.view(),
        await coordinator.rebalance(),
        await coordinator.drain("a"),
        await coordinator.set_scaling(bounds),
        await coordinator.operation("o"),
    ]
    assert answers == [{"id": "x"}] * 5
    assert handle.calls == [("view",), ("rebalance",), ("drain", "a"), ("set_scaling", bounds), ("operation", "o")]


async def test_a_silent_coordinator_is_away_in_time_and_leaves_no_backlog():
    handle = Handle()
    with pytest.raises(CoordinatorAway, match="Ask again"):
        await asyncio.wait_for(RemoteCoordinator(handle, 0.02).drain("a"), 5)
    assert handle.responses[0].is_cancelled


async def test_its_own_errors_come_as_they_are():
    """Ray hands over an error that is of the cause's class too, but whose text is a traceback."""
    cause = UnknownHost("there is no expert host z")
    raised = RayTaskError("drain", "Traceback (most recent call last): ...", cause).as_instanceof_cause()
    assert isinstance(raised, UnknownHost)
    for outcome in (raised, cause):
        with pytest.raises(UnknownHost) as caught:
            await RemoteCoordinator(Handle(outcome), 1.0).drain("z")
        assert caught.value is cause


@pytest.mark.parametrize("error", [RayActorError(), RuntimeError("no replica"), RayTaskError("view", "...", ValueError("x"))])
async def test_anything_else_is_away(error):
    with pytest.raises(CoordinatorAway):
        await RemoteCoordinator(Handle(error), 1.0).view()


async def test_who_stops_waiting_is_not_told_that_it_is_away():
    task = asyncio.create_task(RemoteCoordinator(Handle(), 5.0).view())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
