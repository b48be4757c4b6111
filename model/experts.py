"""Routed experts: their weights, their arithmetic, and `LocalExperts`, the slow and obvious truth of dispatch/combine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from model.gate import Routing


class LogicalExpert(NamedTuple):
    """(layer, expert id) as the checkpoint numbers them."""

    layer: int
    expert: int


@dataclass(frozen=True)
class ExpertWeights:
    """One SwiGLU expert: gate_up [2 * I, H] (gate rows first), down [H, I]; y = down(silu(gate x) * up x)."""

    gate_up: Tensor
    down: Tensor


class Experts(Protocol):
    """Where the routed experts of a model are: here (LocalExperts) or on hosts (router.dispatch)."""

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """Starts the experts of hidden [T, H]; answers with a handle at once."""
        ...

    def combine(self, handle: object) -> Tensor:
        """The weighted sum over each token's experts, [T, H] in hidden's dtype. Waits for it."""
        ...


class ExpertSlots:
    """The experts that one process holds, and the one FFN call over a token batch grouped by expert."""

    def __init__(self, experts: Iterable[tuple[LogicalExpert, ExpertWeights]] = ()) -> None: ...

    def load(self, expert: LogicalExpert, weights: ExpertWeights) -> None: ...
    def unload(self, expert: LogicalExpert) -> None: ...
    def __contains__(self, expert: LogicalExpert) -> bool: ...
    def held(self) -> frozenset[LogicalExpert]: ...

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted partial sums [T, H] float32 of hidden [T, H] over expert_ids [T, K]; id -1 means not here."""
        ...


class LocalExperts:
    """Experts in this process: answers at once. Every other path is tested equal to it."""

    def __init__(self, slots: ExpertSlots) -> None: ...
    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object: ...
    def combine(self, handle: object) -> Tensor: ...
