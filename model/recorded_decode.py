"""Decode steps on a CPU from recordings: of each layer two calls of machine code and the gate's, whatever it is made of.

A step of T sequences differs from the next one only in what its tensors hold. So its layers are recorded once, over tensors that stay
(`model.cpu_recording`), and a step copies into them what is new: embeddings, angles, slots and page tables. The products, their order
and their sums are those of the plain pass, so that the tokens are too.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import AttentionPlan, DecodeGroup, Span
from model.batch import Batch, Combine, Dispatch
from model.cpu_add import add
from model.cpu_recording import NotRecordable, Recording
from model.kv_cache import PagedCache
from model.layers import DecoderLayer, RoutedExperts
from model.rope import Rotation

logger = logging.getLogger("shoal")

# Steps of a size that are made plainly before one is recorded: a recording costs about as much as a step.
_SIGHTINGS = 3
_MAX_TOKENS = 64
_MAX_BYTES = 256 << 20  # of all recordings of a model


class _Size(NamedTuple):
    """What a recording is made for: T tokens, tables of at most so many pages."""

    num_tokens: int
    num_pages: int


@dataclass(eq=False)
class _Step:
    """The tensors that a step is copied into, and for each layer what is done before and after its experts are asked for."""

    hidden: Tensor
    rotation: Rotation
    plan: AttentionPlan
    layers: list[tuple[Recording, Tensor | None, Recording, Tensor | None]]
    last: Tensor
    num_bytes: int


class RecordedDecode:
    """The recordings of one decoder's layers over one cache; with another cache it begins anew.

    One thread uses it. Passes of one size that are under way at once have a recording each.
    """

    def __init__(self, layers: Sequence[DecoderLayer], window: int | None) -> None:
        self._layers = layers
        self._window = window
        self._cache: Callable[[], PagedCache | None] = lambda: None
        self._sightings: dict[_Size, int] = {}
        self._too_large: set[_Size] = set()
        self._free: OrderedDict[int, tuple[_Size, _Step]] = OrderedDict()  # the least used first
        self._num_bytes = 0
        self._is_possible = True

    def forward(
        self, hidden: Tensor, batch: Batch, rotation: Rotation, plan: AttentionPlan, cache: PagedCache
    ) -> Generator[Dispatch | Combine, object, Tensor] | None:
        """The pass over all layers, which returns hidden [T, H]; None where this step is to be made plainly."""
        size = self._size_of(batch, plan, cache)
        if size is None:
            return None
        if self._cache() is not cache:
            self._cache, self._num_bytes = weakref.ref(cache), 0
            self._sightings.clear()
            self._free.clear()
        step = self._take(size)
        if step is None:
            self._sightings[size] = self._sightings.get(size, 0) + 1
            if self._sightings[size] < _SIGHTINGS or size in self._too_large:
                return None
            step = self._record(size, hidden, rotation, cache)
            if step is None:
                return None
            if step.num_bytes > _MAX_BYTES:
                self._too_large.add(size)
                return None
        return self._run(size, step, hidden, batch, rotation, plan, cache)

    def _run(
        self, size: _Size, step: _Step, hidden: Tensor, batch: Batch, rotation: Rotation, plan: AttentionPlan, cache: PagedCache
    ) -> Generator[Dispatch | Combine, object, Tensor]:
        try:
            _fill(step, hidden, rotation, plan)
            for index, (before, normed, shared, routed) in enumerate(step.layers):
                before.replay()
                if normed is None or routed is None:
                    continue
                handle = yield Dispatch(index, normed, batch.token_ids)
                shared.replay()
                answer = yield Combine(handle)
                assert isinstance(answer, Tensor), "the driver answers Combine with the experts' sum"
                routed.copy_(answer)
            return step.last.clone() if routed is None else step.last + routed
        finally:
            if self._cache() is cache:
                self._give_back(size, step)

    def _size_of(self, batch: Batch, plan: AttentionPlan, cache: PagedCache) -> _Size | None:
        decodes = plan.decodes
        if not self._is_possible or not cache.is_read_in_place or decodes is None or decodes.rows is not None:
            return None
        num_tokens, num_pages = decodes.span.tables.shape
        if num_tokens > _MAX_TOKENS or len(batch.logit_rows) != num_tokens:
            return None
        return _Size(num_tokens, 1 << (num_pages - 1).bit_length())

    def _take(self, size: _Size) -> _Step | None:
        for key, (mine, step) in reversed(self._free.items()):
            if mine == size:
                del self._free[key]
                self._num_bytes -= step.num_bytes
                return step
        return None

    def _give_back(self, size: _Size, step: _Step) -> None:
        self._free[id(step)] = (size, step)
        self._num_bytes += step.num_bytes
        while self._num_bytes > _MAX_BYTES:
            _, (dropped_size, dropped) = self._free.popitem(last=False)
            self._num_bytes -= dropped.num_bytes
            self._sightings.pop(dropped_size, None)

    def _record(self, size: _Size, hidden: Tensor, rotation: Rotation, cache: PagedCache) -> _Step | None:
        num_tokens = size.num_tokens
        tables = torch.zeros((num_tokens, size.num_pages), dtype=torch.int64)
        first, last = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.int64)
        group = DecodeGroup(None, Span(tables, size.num_pages * cache.page_size), None, first, last)
        plan = AttentionPlan(torch.zeros(num_tokens, dtype=torch.int64), group, (), self._window)
        turning = Rotation(torch.empty_like(rotation.cos), torch.empty_like(rotation.sin))
        start = residual = torch.empty_like(hidden)
        routed: Tensor | None = None
        layers = []
        try:
            for layer in self._layers:
                before, shared, normed = Recording(), Recording(), None
                answer: Tensor | None = None
                with before.recording():
                    if routed is not None:
                        residual = add(residual, routed)
                    residual = add(residual, layer.attention(layer.attention_norm(residual), turning, plan, cache))
                    mine = layer.mlp_norm(residual)
                    if not isinstance(layer.mlp, RoutedExperts):
                        residual = add(residual, layer.mlp(mine))
                if isinstance(layer.mlp, RoutedExperts):
                    normed, answer = mine, torch.empty_like(hidden)
                    with shared.recording():
                        if layer.mlp.shared is not None:
                            residual = add(residual, layer.mlp.shared(mine))
                routed = answer
                layers.append((before, normed, shared, routed))
        except NotRecordable as error:
            logger.info("decode steps are made plainly: torch computes part of a layer (%s)", error)
            self._is_possible = False
            return None
        num_bytes = sum(before.num_bytes + shared.num_bytes + hidden.nbytes for before, _, shared, _ in layers)
        return _Step(start, turning, plan, layers, residual, num_bytes)


def _fill(step: _Step, hidden: Tensor, rotation: Rotation, plan: AttentionPlan) -> None:
    mine, new = step.plan.decodes, plan.decodes
    assert mine is not None
    assert new is not None
    step.hidden.copy_(hidden)
    step.rotation.cos.copy_(rotation.cos)
    step.rotation.sin.copy_(rotation.sin)
    step.plan.slots.copy_(plan.slots)
    mine.span.tables[:, : new.span.tables.shape[1]].copy_(new.span.tables)
    mine.first.copy_(new.first)
    mine.last.copy_(new.last)
