"""When an operation is over: done because the cluster is as it asked, or rolled back because it took too long."""

from collections.abc import Collection
from dataclasses import dataclass

from cluster.members import Members
from cluster.operations import Operation, Operations
from cluster.planning import Planning
from cluster.run_time_bounds import RunTimeBounds
from router.placement_map import PlacementMap


@dataclass(frozen=True)
class OperationProgress:
    """Looks at what the Coordinator's other parts have come to. `timeout_s` bounds every operation."""

    operations: Operations
    members: Members
    planning: Planning
    bounds: RunTimeBounds
    timeout_s: float

    def follow(self, in_use: Collection[PlacementMap] | None) -> bool:
        """Ends what is over; `in_use` are the maps that routers may use, None while not known. True if something was given up."""
        has_given_up = False
        for operation in self.operations.open():
            ending = self._ending(operation, in_use)
            if ending is not None:
                self.operations.end(operation, "done", ending)
            elif self.operations.age_s(operation) > self.timeout_s:
                self._give_up(operation)
                has_given_up = True
        return has_given_up

    def _ending(self, operation: Operation, in_use: Collection[PlacementMap] | None) -> str | None:
        """Why it is done; None while it is not."""
        if operation.kind == "scaling":
            is_told = self.bounds.are_told([*self.members.hosts, *self.members.routers])
            return "every replica has been told" if is_told else None
        if operation.state != "running":
            return None
        if operation.kind == "rebalance":
            planned = self.planning.last_plan
            reason = planned.reason if planned else "every host holds what it should"
            return reason if self.planning.is_converged() else None
        members = [(key, member) for key, member in self.members.hosts.items() if key.replica_id == operation.target]
        if not members:
            return "the host is gone"
        is_named = in_use is None or any(placement.host_to_experts.get(key) for placement in in_use for key, _ in members)
        return None if is_named or any(member.ready for _, member in members) else "the host holds no expert, and no map in use names it"

    def _give_up(self, operation: Operation) -> None:
        late = f"not done within {self.timeout_s:.0f} s"
        if operation.kind == "drain":
            self.planning.give_up_drain(operation.target)
            self.operations.end(operation, "rolled_back", f"{late}: the host takes part again")
        elif operation.kind == "rebalance":
            self.planning.give_up_moves()
            self.operations.end(operation, "rolled_back", f"{late}: what is loaded by now stays, and nothing more moves")
        else:
            self.operations.end(operation, "rolled_back", f"{late}: not every replica has been told")
