"""Frames: the fixed header, and the typed messages of the data plane."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from router.placement_map import MapVersion


class FrameKind(IntEnum):
    """What a frame says."""

    EXPERTS = 1  # router -> host: run these experts on these tokens
    PARTIAL = 2  # host -> router: one partial sum per token
    NOT_HERE = 3  # host -> router: an expert of the frame is not held here; nothing was computed
    BUSY = 4  # host -> router: past the granted credits; nothing was computed
    FAILED = 5  # host -> router: the computation raised; payload is a sentence
    PING = 6  # either way, answered by the I/O thread, apart from compute
    PONG = 7
    CANCEL = 8  # router -> host: skip frame `sequence` if it still waits
    MESSAGE = 9  # gateway <-> router: a msgpack message


@dataclass(frozen=True)
class ExpertsRequest:
    """Hidden [T, H] in the model's dtype, expert_ids [T, K] int16 (-1: not on this host), weights [T, K] float32."""

    layer: int
    map_version: MapVersion
    hidden: Tensor
    expert_ids: Tensor
    weights: Tensor
    is_prefill: bool = False


@dataclass(frozen=True)
class ExpertsAnswer:
    """PARTIAL: partial [T, H] float32. Otherwise partial is None and `reason` is the sentence."""

    sequence: int
    attempt: int
    kind: FrameKind
    partial: Tensor | None = None
    reason: str = ""
