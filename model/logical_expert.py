"""The name of a routed expert; apart from its weights, so that who only plans need not import torch."""

from typing import NamedTuple


class LogicalExpert(NamedTuple):
    """(layer, expert id) as the checkpoint numbers them."""

    layer: int
    expert: int
