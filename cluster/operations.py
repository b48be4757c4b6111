"""What an operator asked for, followed by its id until it is done or rolled back."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster.decisions import DecisionLog
from cluster.errors import ClusterError

Kind = Literal["rebalance", "drain", "scaling"]
State = Literal["pending", "running", "done", "rolled_back"]
NUM_KEPT = 256


class UnknownOperation(ClusterError):
    """No operation has this id, or it is long over."""

    kind = "unknown_operation"


class UnknownHost(ClusterError):
    """No live expert host has this id: names those that there are."""

    kind = "unknown_host"


class BadBounds(ClusterError):
    """Run-time bounds that make no sense: names the key and what is allowed."""

    kind = "bad_bounds"


@dataclass(frozen=True)
class Operation:
    """`target` is the host of a drain, the bounds of a scaling in words. Times are seconds since 1970, `ended_unix_s` None while open."""

    id: str
    kind: Kind
    target: str
    state: State
    detail: str
    started_unix_s: float
    ended_unix_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be carried out."""
        return self.state in ("pending", "running")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for people and HTTP."""
        return asdict(self)


class Operations:
    """All operations that are open, and the last NUM_KEPT that are over. The same request while one is open is that one."""

    def __init__(self, wall_clock: Callable[[], float], prefix: str, log: DecisionLog) -> None:
        """`prefix` tells the ids of one Coordinator from those of another."""
        self._wall_clock = wall_clock
        self._prefix = prefix
        self._log = log
        self._numbers = itertools.count(1)
        self._operations: dict[str, Operation] = {}

    def begin(self, kind: Kind, target: str, detail: str) -> tuple[Operation, bool]:
        """The operation, and whether it is new."""
        for operation in self.open(kind):
            if operation.target == target:
                return operation, False
        identifier = f"{kind}-{self._prefix}-{next(self._numbers)}"
        operation = Operation(identifier, kind, target, "pending", detail, round(self._wall_clock(), 3))
        self._operations[identifier] = operation
        self._log.tell("operation", f"{identifier}: {detail}")
        over = [name for name, known in self._operations.items() if not known.is_open]
        for name in over[: max(0, len(over) - NUM_KEPT)]:
            del self._operations[name]
        return operation, True

    def move(self, identifier: str, state: State, detail: str) -> Operation:
        """The operation's next state, with a sentence; one that is over stays as it is."""
        operation = self.get(identifier)
        if not operation.is_open:
            return operation
        is_over = state in ("done", "rolled_back")
        moved = replace(operation, state=state, detail=detail, ended_unix_s=round(self._wall_clock(), 3) if is_over else None)
        self._operations[identifier] = moved
        return moved

    def end(self, operation: Operation, state: Literal["done", "rolled_back"], detail: str) -> None:
        """It is over, and the log says how."""
        if self.get(operation.id).is_open:
            self.move(operation.id, state, detail)
            self._log.tell("operation", f"{operation.id} {state.replace('_', ' ')}: {detail}")

    def get(self, identifier: str) -> Operation:
        """Raises UnknownOperation."""
        if identifier not in self._operations:
            raise UnknownOperation(f"there is no operation {identifier}; those of an earlier coordinator ended with it")
        return self._operations[identifier]

    def open(self, kind: Kind | None = None) -> list[Operation]:
        """Those still to be carried out, oldest first."""
        return [known for known in self._operations.values() if known.is_open and kind in (None, known.kind)]

    def age_s(self, operation: Operation) -> float:
        """Seconds since it was asked for."""
        return self._wall_clock() - operation.started_unix_s

    def lines(self, num: int = 16) -> list[dict[str, Any]]:
        """The last ones as plain values, newest last."""
        return [operation.as_dict() for operation in list(self._operations.values())[-num:]]
