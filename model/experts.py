"""Routed experts: their weights, their arithmetic, and `LocalExperts`, the slow and obvious truth of dispatch/combine."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.errors import ExpertNotHeld, ModelError
from model.gate import Routing
from model.logical_expert import LogicalExpert
from model.weights import STORED_DTYPES

if TYPE_CHECKING:
    from model.cpu_experts import LayerTable
    from model.cpu_in_place import InPlaceTable


@dataclass(frozen=True)
class ExpertWeights:
    """One SwiGLU expert: gate_up [2 * I, H] (gate rows first), down [H, I]; y = down(silu(gate x) * up x)."""

    gate_up: Tensor
    down: Tensor

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return self.gate_up.nbytes + self.down.nbytes

    @property
    def is_on_cpu(self) -> bool:
        """Whether the weights lie in host memory."""
        return self.gate_up.device.type == "cpu"

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        """What all experts of a layer have in common: shape of gate_up, type, device."""
        return tuple(self.gate_up.shape), self.gate_up.dtype, self.gate_up.device


class Experts(Protocol):
    """Where the routed experts of a model are: here (LocalExperts) or on hosts (router.dispatch)."""

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """Starts the experts of hidden [T, H]; answers with a handle at once."""
        ...

    def combine(self, handle: object) -> Tensor:
        """The weighted sum over each token's experts, [T, H] in hidden's dtype. Waits for it; the handle is used up either way."""
        ...

    def abandon(self, handle: object) -> None:
        """Gives up a handle that nobody will combine, since the pass that asked has failed."""
        ...


@dataclass(frozen=True)
class GroupedChoices:
    """The choices of a batch sorted by expert: the activated experts ascending, how many choices each has, and which."""

    experts: list[int]
    counts: list[int]
    choices: Tensor  # [N] int64, indices into the flattened [T * K]; without those that are -1


def group_by_expert(expert_ids: Tensor) -> GroupedChoices:
    """Groups expert_ids [T, K]. Waits once for a device that is not the CPU."""
    if expert_ids.device.type == "cpu":
        return _group_on_cpu(expert_ids)
    sorted_ids, choices = torch.sort(expert_ids.flatten(), stable=True)
    unique_ids, unique_counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    experts, counts = unique_ids.tolist(), unique_counts.tolist()
    if experts and experts[0] == -1:
        return GroupedChoices(experts[1:], counts[1:], choices[counts[0] :])
    return GroupedChoices(experts, counts, choices)


def _group_on_cpu(expert_ids: Tensor) -> GroupedChoices:
    """The same by NumPy: for a few ids a third of the time."""
    ids = expert_ids.flatten().numpy()
    here = np.flatnonzero(ids != -1)
    order = here[ids[here].argsort(kind="stable")]
    chosen = ids[order]
    starts = np.flatnonzero(np.diff(chosen, prepend=chosen[:1] - 1))
    counts = np.diff(starts, append=len(chosen))
    return GroupedChoices(chosen[starts].tolist(), counts.tolist(), torch.from_numpy(order))


def swiglu(weights: ExpertWeights, hidden: Tensor) -> Tensor:
    """down(silu(gate x) * up x) for hidden [m, H]; float32 on a CPU, the weights' type elsewhere."""
    dtype = torch.float32 if hidden.device.type == "cpu" else weights.gate_up.dtype
    gate, up = functional.linear(hidden.to(dtype), weights.gate_up.to(dtype)).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, weights.down.to(dtype))


def _check_shapes(expert: LogicalExpert, weights: ExpertWeights) -> None:
    gate_up, down = tuple(weights.gate_up.shape), tuple(weights.down.shape)
    if len(gate_up) != 2 or gate_up[0] % 2 or down != (gate_up[1], gate_up[0] // 2):
        raise ModelError(f"{expert}: gate_up {list(gate_up)} and down {list(down)} are not [2 * I, H] and [H, I]")
    if weights.gate_up.dtype != weights.down.dtype or weights.gate_up.device != weights.down.device:
        raise ModelError(f"{expert}: gate_up and down are not of one type on one device")


def _check_batch(hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
    if hidden.ndim != 2 or expert_ids.ndim != 2 or expert_ids.shape != weights.shape or len(hidden) != len(expert_ids):
        raise ModelError(
            f"hidden {list(hidden.shape)}, expert_ids {list(expert_ids.shape)} and weights {list(weights.shape)} are not "
            "[T, H], [T, K] and [T, K]"
        )


@dataclass(frozen=True)
class _HeldLayer:
    """What is held of one layer; never changed, only replaced. `table` is there where the CPU kernel can read the weights."""

    weights: Mapping[int, ExpertWeights]
    table: "LayerTable | None" = None
    hidden_size: int = 0


_NO_EXPERTS = _HeldLayer({})


def _hold(weights: Mapping[int, ExpertWeights]) -> _HeldLayer:
    if not weights:
        return _NO_EXPERTS
    some = next(iter(weights.values()))
    table = None
    if some.is_on_cpu and some.gate_up.dtype in STORED_DTYPES:
        from model import cpu_experts  # brings Numba, for which a router or a GPU host has no use

        cpu_experts.prepare(some.gate_up.dtype)
        table = cpu_experts.LayerTable({expert: (one.gate_up, one.down) for expert, one in weights.items()})
    return _HeldLayer(weights, table, some.hidden_size)


class ExpertSlots:
    """The experts that one process holds, and the one FFN call over a token batch grouped by expert.

    `load` and `unload` may run in another thread while `forward` does: they replace a layer's mapping, never change one, so
    a call goes on with the experts it began with and takes no lock.
    """

    def __init__(self, experts: Iterable[tuple[LogicalExpert, ExpertWeights]] = (), num_threads: int | None = None) -> None:
        """`num_threads` share the experts of a call on a CPU; by default as many as torch uses."""
        self._num_threads = num_threads or torch.get_num_threads()
        self._writer = threading.Lock()
        self._layers: Mapping[int, _HeldLayer] = {}
        self._in_place: InPlaceTable | None = None
        for expert, weights in experts:
            self.load(expert, weights)

    def load(self, expert: LogicalExpert, weights: ExpertWeights) -> None:
        """Holds the expert from the next call on, in place of an earlier copy of it.

        ModelError if its two shapes do not fit together, or differ in shape, type or device from the layer's other experts.
        """
        _check_shapes(expert, weights)
        weights = ExpertWeights(weights.gate_up.contiguous(), weights.down.contiguous())
        with self._writer:
            others = self._layers.get(expert.layer, _NO_EXPERTS).weights
            kind = next(iter(others.values()), weights).kind
            if weights.kind != kind:
                raise ModelError(f"{expert}: expected {kind} as the layer's other experts are, found {weights.kind}")
            self._replace(expert.layer, _hold({**others, expert.expert: weights}))

    def unload(self, expert: LogicalExpert) -> None:
        """Lets go of the expert; ExpertNotHeld if it is not here."""
        with self._writer:
            weights = dict(self._layers.get(expert.layer, _NO_EXPERTS).weights)
            if weights.pop(expert.expert, None) is None:
                raise ExpertNotHeld([expert])
            self._replace(expert.layer, _hold(weights))

    def open_in_place(self, max_bytes: int) -> "InPlaceTable | None":
        """The layers for one thread to compute without the interpreter, as they come and go.

        Of batches those that take no longer than to read `max_bytes` of weights. None for slots with a `forward` of their own.
        """
        if type(self).forward is not ExpertSlots.forward:
            return None
        from model.cpu_in_place import InPlaceTable  # brings Numba, for which a GPU host has no use
        from model.cpu_threads import crew_of

        table = InPlaceTable()
        with self._writer:
            self._in_place = table
            for layer, held in self._layers.items():
                table.put(layer, None if held.table is None else held.table.record)
        table.open(max_bytes, *crew_of(self._num_threads))
        return table

    def _replace(self, layer: int, held: _HeldLayer) -> None:
        """Under the writer's lock. What was held until now is let go of when nobody computes with it any more."""
        before = self._layers
        self._layers = {**before, layer: held}
        if self._in_place is not None:
            self._in_place.put(layer, None if held.table is None else held.table.record)

    def __contains__(self, expert: LogicalExpert) -> bool:
        return expert.expert in self._layers.get(expert.layer, _NO_EXPERTS).weights

    def held(self) -> frozenset[LogicalExpert]:
        """All experts that a call may name now."""
        return frozenset(LogicalExpert(layer, expert) for layer, held in self._layers.items() for expert in held.weights)

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted partial sums [T, H] float32 of hidden [T, H] over expert_ids [T, K]; id -1 means not here.

        ExpertNotHeld, before anything is computed, if an id is neither held nor -1; ModelError if the shapes do not fit. On a
        CPU the arithmetic is float32 whatever the storage; elsewhere it is in the weights' own type.
        """
        held = self._layers.get(layer, _NO_EXPERTS)
        _check_batch(hidden, expert_ids, weights)
        if held.weights and held.hidden_size != hidden.shape[1]:
            raise ModelError(f"hidden has {hidden.shape[1]} columns; the experts of layer {layer} take {held.hidden_size}")
        partial = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if held.table is None:
            self._add_each(layer, held, hidden, expert_ids, weights, partial)
            return partial
        ids = expert_ids.to(torch.int16).contiguous().numpy()
        states, scales = hidden.float().contiguous().numpy(), weights.float().contiguous().numpy()
        if not held.table.run(states, ids, scales, partial.numpy(), self._num_threads):
            _check_held(layer, held, group_by_expert(expert_ids).experts)
        return partial

    def _add_each(self, layer: int, held: _HeldLayer, hidden: Tensor, expert_ids: Tensor, weights: Tensor, partial: Tensor) -> None:
        """Adds the activated experts, one product of torch after another."""
        grouped = group_by_expert(expert_ids)
        _check_held(layer, held, grouped.experts)
        choices = grouped.choices.to(hidden.device)
        rows = choices // max(expert_ids.shape[1], 1)
        scales = weights.to(device=hidden.device, dtype=torch.float32).flatten()[choices]
        groups = zip(grouped.experts, torch.split(rows, grouped.counts), torch.split(scales, grouped.counts), strict=True)
        for expert, expert_rows, expert_scales in groups:
            output = swiglu(held.weights[expert], hidden[expert_rows]).float()
            partial.index_add_(0, expert_rows, output * expert_scales[:, None])


def _check_held(layer: int, held: _HeldLayer, experts: list[int]) -> None:
    missing = [LogicalExpert(layer, expert) for expert in experts if expert not in held.weights]
    if missing:
        raise ExpertNotHeld(missing)


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

    def abandon(self, handle: object) -> None:
        """Nothing is under way: the answer was there at once."""
