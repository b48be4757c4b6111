"""Expert hosts with a pace: the real weights and sums, and a fixed time for every call, so that a stream of a tiny model lasts."""

import time

from torch import Tensor

from actors.expert_host import ExpertHostReplica
from model.experts import ExpertSlots

PACE_S = 0.1


class PacedSlots(ExpertSlots):
    """`forward` takes PACE_S longer."""

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As ExpertSlots."""
        time.sleep(PACE_S)
        return super().forward(layer, hidden, expert_ids, weights)


class PacedExpertHost(ExpertHostReplica):
    """A host like any other, but for its pace."""

    slots_type = PacedSlots
