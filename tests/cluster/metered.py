"""Expert hosts with a metered speed: the real weights and sums, and a delay for each token's expert, slept and not computed.

On two cores more hosts add no speed; with these they do, as on a cluster whose hosts have devices of their own.
"""

import time

from torch import Tensor

from actors.expert_host import ExpertHostReplica
from model.experts import ExpertSlots

DELAY_S = 0.001  # of one token in one expert


class MeteredSlots(ExpertSlots):
    """`forward` takes DELAY_S longer for each choice that is held here."""

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As ExpertSlots."""
        time.sleep(DELAY_S * int((expert_ids >= 0).sum()))
        return super().forward(layer, hidden, expert_ids, weights)


class MeteredExpertHost(ExpertHostReplica):
    """A host like any other, but for its speed."""

    slots_type = MeteredSlots
