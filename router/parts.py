"""A token batch on its way to hosts: one handle, and the parts that were sent to one host each."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.errors import RouterError
from router.grouping import NOBODY, group_choices
from router.placement_map import HostKey, MapVersion

if TYPE_CHECKING:
    from router.host_links import Link
    from router.quick_batches import QuickBatch


class HostGroup(NamedTuple):
    """The tokens of one host: their rows [n] (None: all of the batch's), and [n, K] ids with -1 where the expert is not the host's."""

    host: int
    rows: Tensor | None
    expert_ids: Tensor


def group_by_host(expert_ids: Tensor, host_of_choice: NDArray[np.int64], num_hosts: int) -> list[HostGroup]:
    """Groups expert_ids [T, K] int16 by host_of_choice [T, K], by ascending host, those of NOBODY first.

    A token is in a host's group once, however many experts it has there; a host of nearly all tokens gets all of them.
    """
    num_tokens = len(host_of_choice)
    sizes, rows, ids = group_choices(expert_ids.numpy(), host_of_choice, num_hosts)
    groups = []
    for index, size in enumerate(sizes.tolist()):
        if not size:
            continue
        if size == num_tokens:
            groups.append(HostGroup(index + NOBODY, None, torch.from_numpy(ids[index])))
        else:
            groups.append(HostGroup(index + NOBODY, torch.from_numpy(rows[index, :size]), torch.from_numpy(ids[index, :size])))
    return groups


@dataclass(slots=True)
class Trouble:
    """What a part has met so far. `avoided` hosts are taken only where there is no other; `refused` ones not under that map."""

    reason: str = ""
    failures: int = 0
    deaths: int = 0
    silences: int = 0
    backoff_s: float = 0.0
    avoided: set[HostKey] = field(default_factory=set)
    refused: dict[HostKey, MapVersion] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Part:
    """Tokens of a batch for one host: `rows` of the batch (None: all), hidden [n, H], expert_ids [n, K] int16, weights [n, K].

    `link` is the channel that it was sent on, as long as a buffer there is its own; `host` and `version` are those of the last try.
    """

    handle: "BatchHandle"
    rows: Tensor | None
    hidden: Tensor
    expert_ids: Tensor
    weights: Tensor
    host: HostKey | None = None
    version: MapVersion | None = None
    link: "Link | None" = None
    sequence: int = 0
    attempt: int = 0
    sent_at: float = 0.0
    not_before: float = 0.0
    partial: Tensor | None = None
    trouble: Trouble | None = None

    def take(self, group: HostGroup) -> "Part":
        """The tokens of `group`, with the same past."""
        trouble = self.trouble and replace(self.trouble, avoided=set(self.trouble.avoided), refused=dict(self.trouble.refused))
        rows, hidden, weights = self.rows, self.hidden, self.weights
        if group.rows is not None:
            rows = group.rows if rows is None else rows[group.rows]
            hidden, weights = hidden.index_select(0, group.rows), weights.index_select(0, group.rows)
        return Part(self.handle, rows, hidden, group.expert_ids, weights, attempt=self.attempt, trouble=trouble)

    def met(self, reason: str) -> Trouble:
        """The record of what this part has met, with `reason` as the latest."""
        self.trouble = self.trouble or Trouble()
        self.trouble.reason = reason
        return self.trouble

    @property
    def reason(self) -> str:
        """Why it has no answer yet."""
        return self.trouble.reason if self.trouble else "not answered yet"

    def counts(self) -> list[int]:
        """Tokens for each of the E experts."""
        counts: list[int] = np.bincount(self.expert_ids.numpy().ravel() + 1, minlength=self.handle.num_experts + 1).tolist()
        return counts[1:]

    def name(self) -> str:
        """Layer and experts, for a person."""
        experts = [expert for expert, count in enumerate(self.counts()) if count]
        more = f" and {len(experts) - 6} more" if len(experts) > 6 else ""
        return f"layer {self.handle.layer} experts {', '.join(map(str, experts[:6]))}{more}"


@dataclass(slots=True, eq=False)
class BatchHandle:
    """One dispatch: open while parts wait or are sent; `version` is the map that it pins.

    `look_at` is when to look after hosts that have not answered, `deadline` when to give up; monotonic seconds.
    """

    layer: int
    num_experts: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    version: MapVersion
    deadline: float
    look_at: float
    waiting: list[Part] = field(default_factory=list)
    sent: dict[int, Part] = field(default_factory=dict)
    answered: list[Part] = field(default_factory=list)
    error: RouterError | None = None
    quick: "QuickBatch | None" = None  # as long as it is machine code's

    @property
    def is_open(self) -> bool:
        """Whether any part still lacks its answer."""
        return bool(self.waiting or self.sent)

    def total(self) -> Tensor:
        """The sum of all answers, [T, H]. Whole parts first, each kind as it was sent, so that the same batch gives the same bits."""
        parts = sorted(self.answered, key=lambda part: part.sequence)
        whole = [part.partial for part in parts if part.rows is None and part.partial is not None]
        # The answers lie in buffers that go back to their channels: the sum is in memory of its own from the start.
        if len(whole) > 1:
            total = torch.add(whole[0], whole[1])
        else:
            total = whole[0].clone() if whole else torch.zeros(self.shape, dtype=torch.float32)
        for partial in whole[2:]:
            total.add_(partial)
        for part in parts:
            if part.rows is not None:
                assert part.partial is not None
                total.index_add_(0, part.rows, part.partial)
        return total.to(device=self.device, dtype=self.dtype)
