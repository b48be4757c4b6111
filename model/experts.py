"""Routed experts: their weights, their arithmetic, and `LocalExperts`, the slow and obvious truth of dispatch/combine."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.errors import ExpertNotHeld, ModelError
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

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up.shape[1]


class Experts(Protocol):
    """Where the routed experts of a model are: here (LocalExperts) or on hosts (router.dispatch)."""

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """Starts the experts of hidden [T, H]; answers with a handle at once."""
        ...

    def combine(self, handle: object) -> Tensor:
        """The weighted sum over each token's experts, [T, H] in hidden's dtype. Waits for it."""
        ...


class ExpertSlots:
    """The experts that one process holds, and the one FFN call over a token batch grouped by expert.

    `load` and `unload` may run in another thread while `forward` does: they replace a layer's mapping, never change one, so
    a call goes on with the experts it began with and takes no lock.
    """

    def __init__(self, experts: Iterable[tuple[LogicalExpert, ExpertWeights]] = ()) -> None:
        self._writer = threading.Lock()
        self._layers: Mapping[int, Mapping[int, ExpertWeights]] = {}
        for expert, weights in experts:
            self.load(expert, weights)

    def load(self, expert: LogicalExpert, weights: ExpertWeights) -> None:
        """Holds the expert from the next call on, in place of an earlier copy of it. ModelError if its shapes do not fit together."""
        _check_shapes(expert, weights)
        with self._writer:
            layer = {**self._layers.get(expert.layer, {}), expert.expert: weights}
            self._layers = {**self._layers, expert.layer: layer}

    def unload(self, expert: LogicalExpert) -> None:
        """Lets go of the expert; ExpertNotHeld if it is not here."""
        with self._writer:
            layer = dict(self._layers.get(expert.layer, {}))
            if layer.pop(expert.expert, None) is None:
                raise ExpertNotHeld([expert])
            self._layers = {**self._layers, expert.layer: layer}

    def __contains__(self, expert: LogicalExpert) -> bool:
        return expert.expert in self._layers.get(expert.layer, {})

    def held(self) -> frozenset[LogicalExpert]:
        """All experts that a call may name now."""
        return frozenset(LogicalExpert(layer, expert) for layer, experts in self._layers.items() for expert in experts)

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted partial sums [T, H] float32 of hidden [T, H] over expert_ids [T, K]; id -1 means not here.

        ExpertNotHeld, before anything is computed, if an id is neither held nor -1; ModelError if the shapes do not fit. A
        token's experts are added in the order of their ids. On a CPU the arithmetic is float32 whatever the storage; elsewhere
        it is in the weights' own type.
        """
        held = self._layers.get(layer, {})
        if hidden.ndim != 2 or expert_ids.ndim != 2 or expert_ids.shape != weights.shape or len(hidden) != len(expert_ids):
            raise ModelError(
                f"hidden {list(hidden.shape)}, expert_ids {list(expert_ids.shape)} and weights {list(weights.shape)} are not "
                "[T, H], [T, K] and [T, K]"
            )
        groups = group_by_expert(expert_ids)
        missing = [LogicalExpert(layer, group.expert) for group in groups if group.expert not in held]
        if missing:
            raise ExpertNotHeld(missing)
        if any(held[group.expert].hidden_size != hidden.shape[1] for group in groups):
            raise ModelError(f"hidden has {hidden.shape[1]} columns; the experts of layer {layer} take another number")
        partial = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        flat_weights = weights.to(device=hidden.device, dtype=torch.float32).flatten()
        for group in groups:
            pairs = group.pairs.to(hidden.device)
            rows = pairs // expert_ids.shape[1]
            output = swiglu(held[group.expert], hidden[rows])
            partial.index_add_(0, rows, output.float() * flat_weights[pairs, None])
        return partial


@dataclass(frozen=True)
class ExpertGroup:
    """The tokens of one activated expert, as indices into the flattened [T * K] choices; token = pair // K."""

    expert: int
    pairs: Tensor  # [m] int64, ascending, on expert_ids' device


def group_by_expert(expert_ids: Tensor) -> list[ExpertGroup]:
    """The activated experts of expert_ids [T, K] in ascending order, without -1. Waits once for a device that is not the CPU."""
    sorted_ids, order = torch.sort(expert_ids.flatten(), stable=True)
    experts, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    pairs = torch.split(order, counts.tolist())
    return [ExpertGroup(expert, group) for expert, group in zip(experts.tolist(), pairs, strict=True) if expert != -1]


def swiglu(weights: ExpertWeights, hidden: Tensor) -> Tensor:
    """down(silu(gate x) * up x) for hidden [m, H]; float32 on a CPU, the weights' type elsewhere."""
    dtype = torch.float32 if hidden.device.type == "cpu" else weights.gate_up.dtype
    gate, up = functional.linear(hidden.to(dtype), weights.gate_up.to(dtype)).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, weights.down.to(dtype))


def _check_shapes(expert: LogicalExpert, weights: ExpertWeights) -> None:
    gate_up, down = tuple(weights.gate_up.shape), tuple(weights.down.shape)
    if len(gate_up) != 2 or gate_up[0] % 2 or down != (gate_up[1], gate_up[0] // 2):
        raise ModelError(f"{expert}: gate_up {list(gate_up)} and down {list(down)} are not [2 * I, H] and [H, I]")


class LocalExperts:
    """Experts in this process: answers at once. Every other path is tested equal to it."""

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """Computes at once; the handle is the answer."""
        return self._slots.forward(layer, hidden, routing.expert_ids, routing.weights).to(hidden.dtype)

    def combine(self, handle: object) -> Tensor:
        """The answer that `dispatch` computed, [T, H] in hidden's dtype."""
        assert isinstance(handle, Tensor)
        return handle
