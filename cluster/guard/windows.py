"""How much was used in the last minute. Pure; Redis counts by the same rule (redis_counts.py), and a test holds the two equal."""

import math
from collections.abc import Mapping

WINDOW_S = 60.0
SLOT_S = 5.0
# One more than make a minute: whatever is up to 60 s old is counted, so that no 60 s anywhere has more than the limit.
NUM_SLOTS = int(WINDOW_S / SLOT_S) + 1


def slot_of(now_s: float) -> int:
    """Time is cut into slots of SLOT_S."""
    return int(now_s // SLOT_S)


def live(slots: Mapping[int, int], now_s: float) -> dict[int, int]:
    """What still counts, by slot."""
    oldest = slot_of(now_s) - NUM_SLOTS + 1
    return {slot: used for slot, used in slots.items() if slot >= oldest}


def wait_s(slots: Mapping[int, int], now_s: float, num: int, limit: int) -> float:
    """How long until `num` more fit below `limit`: 0 for now, infinity for never."""
    if num > limit:
        return math.inf
    counting = live(slots, now_s)
    total, wait = sum(counting.values()), 0.0
    for slot in sorted(counting):
        if total + num <= limit:
            break
        total -= counting[slot]
        wait = (slot + NUM_SLOTS) * SLOT_S - now_s
    return wait
