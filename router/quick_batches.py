"""Batches on the quick way: sent and awaited by machine code as long as nothing is unusual, ordinary batches from then on."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import cpu_threads
from model.cpu_parts import compile_for
from router.expert_load import ExpertLoad
from router.host_links import HostLinks, Link
from router.parts import BatchHandle, Part
from router.placement_map import MapVersion
from router.replica_tables import ReplicaTables
from router.transport.compiled_frames import FLOAT32
from router.transport.frames import Sizes
from router.transport.quick_channel import QuickChannel
from router.transport.quick_hop import (
    COMPLETE,
    COMPLETE_AND_KEPT,
    FRAME_WORDS,
    IS_ANSWERED,
    IS_KEPT,
    IS_SENT,
    NUM_TOKENS,
    PLACE,
    RECEIVED,
    SEQUENCE,
    TAKES_ALL,
    UNUSUAL,
    Words,
    await_batch,
    give_back,
    send_batch,
)

_NO_HOSTS: Words = np.zeros((0, 0), np.int64)
_NS = 1e9


def _are_readable(hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> bool:
    return (
        hidden.dtype == weights.dtype == torch.float32
        and expert_ids.dtype == torch.int64
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in (hidden, expert_ids, weights))
    )


@dataclass(slots=True, eq=False)
class QuickBatch:
    """One batch under way over N hosts: the addresses of their channels [N], its frames [N, FRAME_WORDS] and their rows [N, T]."""

    links: Sequence[Link | None]
    channels: Words
    frames: Words
    rows: Words
    num_frames: int
    top_k: int
    sent_at: float

    @property
    def used(self) -> list[tuple[int, Link, QuickChannel]]:
        """The hosts that have a frame."""
        found = []
        for index in np.flatnonzero(self.frames[:, NUM_TOKENS]).tolist():
            link = self.links[index]
            assert link is not None
            assert link.quick is not None
            found.append((index, link, link.quick))
        return found


class Settled(NamedTuple):
    """Parts that were not sent, and bytes that machine code has read for a channel."""

    unsent: list[Part]
    received: list[tuple[Link, int]]


class QuickBatches:
    """One thread uses it, the engine's. Hosts are in the order of the map's, `ReplicaTables.hosts`."""

    def __init__(self, links: HostLinks, tables: ReplicaTables, decode_tokens: int) -> None:
        self._links = links
        self._tables = tables
        self._decode_tokens = decode_tokens
        prepare()
        self._of = (-1, MapVersion(-1, -1))
        self._is_stale, self._is_near = True, False
        self._num_bytes = 0  # that a buffer at hand has
        self._links_of: list[Link | None] = []
        self._channels: Words = np.zeros(0, np.int64)

    def send(
        self, handle: BatchHandle, hidden: Tensor, expert_ids: Tensor, weights: Tensor, sequence: int, load: ExpertLoad
    ) -> QuickBatch | None:
        """Sends hidden [T, H] to the hosts of expert_ids [T, K] int64, frames numbered from `sequence` on by the hosts' order.

        None, and nothing is done, where that is not machine code's. `num_frames` below 0: not all were sent, and it must be settled.
        """
        if len(hidden) > self._decode_tokens or not _are_readable(hidden, expert_ids, weights):
            return None
        (num_tokens, size), top_k, layer = hidden.shape, expert_ids.shape[1], handle.layer
        if self._of != (self._links.changes, self._tables.version):
            self._look_up()
        if not self._is_near:
            return None
        num_bytes = num_tokens * (8 * size + 6 * top_k) + 64  # what all tokens would take
        if self._is_stale or num_bytes > self._num_bytes:
            self._prepare(num_bytes)
        known = self._tables.replicas_of(layer, handle.num_experts)
        hosts = _NO_HOSTS
        if known.has_choice:
            if int(expert_ids.max()) >= handle.num_experts:
                return None
            hosts = self._tables.choose(known, expert_ids.to(torch.int16).numpy(), handle.num_experts)
        frames = np.empty((len(self._channels), FRAME_WORDS), np.int64)
        rows = np.empty((len(self._channels), num_tokens), np.int64)
        places = expert_ids.data_ptr(), weights.data_ptr(), hidden.data_ptr()
        sizes = num_tokens, top_k, size, layer, *handle.version, sequence
        cpu_threads.rest()  # as `HostLinks.rest_helpers`: these hosts are of this node
        with load.counting(layer, handle.num_experts) as counts:
            answer = send_batch(self._channels, known.table, hosts, counts, *places, *sizes, frames, rows)
            if answer == UNUSUAL:
                self._prepare(num_bytes)  # another batch may have the buffers that were at hand
                answer = send_batch(self._channels, known.table, hosts, counts, *places, *sizes, frames, rows)
        if answer == UNUSUAL:
            return None
        return QuickBatch(self._links_of, self._channels, frames, rows, answer, top_k, time.monotonic())

    def collect(self, handle: BatchHandle, batch: QuickBatch, timeout_s: float) -> Tensor | None:
        """The sum of all answers, [T, H]; None where it is not machine code that can bring it about."""
        total = torch.empty(handle.shape, dtype=torch.float32)
        look_s, started = self._links.look_s(batch.num_frames), time.perf_counter()
        waits = int(timeout_s * _NS), int(min(look_s, timeout_s) * _NS)
        answer = await_batch(batch.channels, batch.frames, batch.rows, *waits, total.data_ptr(), *handle.shape)
        if answer not in (COMPLETE, COMPLETE_AND_KEPT):
            return None
        self._links.note_wait(batch.num_frames, time.perf_counter() - started)
        if answer == COMPLETE_AND_KEPT:
            for index, _, channel in batch.used:
                if batch.frames[index, IS_KEPT]:
                    channel.release(int(batch.frames[index, PLACE]))
        return total

    def settle(self, handle: BatchHandle, batch: QuickBatch) -> Settled:
        """Makes it an ordinary batch: its frames' parts are answered, are waited for on their channels, or were not sent."""
        settled = Settled([], [])
        for index, link, channel in batch.used:
            frame = batch.frames[index]
            number, sequence, offset = int(frame[NUM_TOKENS]), int(frame[SEQUENCE]), int(frame[PLACE])
            place = channel.place_of(offset, Sizes(number, handle.shape[1], batch.top_k, FLOAT32))
            rows = None if frame[TAKES_ALL] else torch.from_numpy(batch.rows[index, :number].copy())
            part = Part(handle, rows, place.hidden.clone(), place.expert_ids.clone(), place.weights.clone())
            if frame[IS_SENT]:
                part.host, part.version, part.sequence, part.attempt = link.host, handle.version, sequence, 1
                part.sent_at = batch.sent_at
                if not frame[IS_ANSWERED]:
                    channel.take_over(sequence, place, offset, batch.sent_at)
                    part.link = link
                    link.unanswered[sequence] = handle.sent[sequence] = part
                    if frame[RECEIVED]:
                        settled.received.append((link, int(frame[RECEIVED])))
                    continue
                part.partial = place.partial.clone()
                handle.answered.append(part)
            else:
                settled.unsent.append(part)
            if not give_back(channel.words.ctypes.data, frame):
                channel.release(offset)
        return settled

    def mistrust(self) -> None:
        """Channels have been used otherwise: what machine code knows of them is looked at again."""
        self._is_stale = True

    def _look_up(self) -> None:
        """The hosts of the map and their channels."""
        self._of = self._links.changes, self._tables.version
        self._links_of = [self._links.get(host) for host in self._tables.hosts]
        channels = [None if link is None else link.quick for link in self._links_of]
        # One host that is lost or elsewhere, and most batches need it: none is tried then.
        self._is_near = bool(channels) and None not in channels
        self._channels = np.array([0 if channel is None else channel.words.ctypes.data for channel in channels], np.int64)
        self._is_stale = True

    def _prepare(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._is_stale = False
        for link in self._links_of:
            if link is not None and link.quick is not None:
                link.quick.prepare(self._num_bytes, is_wanted=link.host not in self._links.suspects)


@functools.cache
def prepare() -> None:
    """Compiles for this process: seconds the first time on a machine, milliseconds after."""
    words, table = "int64[:, ::1]", "int64[::1]"
    code: Any
    for code, signature in (
        (send_batch, f"int64({table}, {table}, {words}, {table}, {', '.join(['int64'] * 10)}, {words}, {words})"),
        (await_batch, f"int64({table}, {words}, {words}, {', '.join(['int64'] * 5)})"),
        (give_back, f"boolean(int64, {table})"),
    ):
        compile_for(code, signature)
