"""Whether a step runs as one token batch or as two, so that one's attention runs while the other's experts are away: measured, not set.

Two read the weights twice and send twice as many frames; what they can win back is the time in which the router only waits.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

# Of a step in one batch: with less of it spent waiting, two cannot win and are not tried.
MIN_WAITING_SHARE = 0.15
# By so much two must be faster: a measured time is not exact.
MIN_GAIN = 0.03
# Steps of a trial, and steps until the next one: twice as many each time that it changes nothing.
TRIAL_STEPS = 5
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024


def _last() -> deque[float]:
    return deque(maxlen=TRIAL_STEPS)


@dataclass
class _SizeClass:
    """Steps of about as many tokens: seconds a token of the last with one and with two batches, and the share of waiting with one."""

    token_s: dict[int, deque[float]] = field(default_factory=lambda: {1: _last(), 2: _last()})
    waiting_shares: deque[float] = field(default_factory=_last)
    best: int = 1
    pause: int = FIRST_PAUSE
    until_trial: int = TRIAL_STEPS
    num_tried: int = 0

    def number(self) -> int:
        if self.until_trial > 0:
            return self.best
        if self.best == 1 and statistics.median(self.waiting_shares) < MIN_WAITING_SHARE:
            return 1
        return 3 - self.best

    def observe(self, number: int, token_s: float, waiting_share: float) -> None:
        self.token_s[number].append(token_s)
        if number == 1:
            self.waiting_shares.append(waiting_share)
        if number == self.best:
            self.until_trial -= 1
            return
        self.num_tried += 1
        if self.num_tried == TRIAL_STEPS:
            self._decide()

    def _decide(self) -> None:
        """By the trial, and by the steps before it."""
        one, two = (statistics.median(self.token_s[number]) for number in (1, 2))
        best = 2 if two < (1 - MIN_GAIN) * one else 1
        self.pause = FIRST_PAUSE if best != self.best else min(2 * self.pause, LONGEST_PAUSE)
        self.best, self.until_trial, self.num_tried = best, self.pause, 0


class MicroBatches:
    """Says how many to run next, and learns from what they took. One thread uses it."""

    def __init__(self) -> None:
        self._classes: dict[tuple[int, bool], _SizeClass] = {}

    def number_for(self, num_tokens: int, num_sequences: int) -> int:
        """1 or 2; a single sequence is never split."""
        return 1 if num_sequences < 2 else self._class_of(num_tokens, num_sequences).number()

    def observe(self, num_tokens: int, num_sequences: int, number: int, step_s: float, waited_s: float) -> None:
        """A step took step_s, of which it did nothing but wait for waited_s; infinity for one that failed."""
        if num_sequences >= 2:
            self._class_of(num_tokens, num_sequences).observe(number, step_s / num_tokens, waited_s / step_s)

    def _class_of(self, num_tokens: int, num_sequences: int) -> _SizeClass:
        # Sizes of one class differ by at most a fifth; decode steps are apart from those with prompts.
        return self._classes.setdefault((round(4 * math.log2(num_tokens)), num_tokens == num_sequences), _SizeClass())
