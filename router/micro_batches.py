"""Whether a step runs as one token batch or as two, so that one's attention runs while the other's experts are away: measured, not set.

Two read the weights twice and send twice as many frames; what they can win back is the time in which the router only waits.
"""

import math
from dataclasses import dataclass, field

# Of a step in one batch: with less of it spent waiting, two cannot win and are not tried.
MIN_WAITING_SHARE = 0.15
# By so much two must be faster: a measured time is not exact.
MIN_GAIN = 0.03
# Steps of a trial, and steps until the next one: twice as many each time that it changes nothing.
TRIAL_STEPS = 4
FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
_SHARE_OF_LAST = 0.25
_LONGEST_COUNTED = 2.0  # times the usual: one slow step says little


@dataclass
class _Mean:
    """Of late, and of how many."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        if self.count == 0:
            self.value = value
        else:
            self.value += (min(value, _LONGEST_COUNTED * self.value) - self.value) * max(_SHARE_OF_LAST, 1 / (1 + self.count))
        self.count += 1


@dataclass
class _SizeClass:
    """Steps of about as many tokens: seconds a token with one and with two batches, and the share of waiting with one."""

    token_s: dict[int, _Mean] = field(default_factory=lambda: {1: _Mean(), 2: _Mean()})
    waiting_share: _Mean = field(default_factory=_Mean)
    num_steps: int = 0
    trial_from: int = TRIAL_STEPS
    pause: int = FIRST_PAUSE
    best: int = 1

    def number(self) -> int:
        if self.best == 1 and self.waiting_share.value < MIN_WAITING_SHARE:
            return 1
        return 3 - self.best if self.num_steps >= self.trial_from else self.best

    def observe(self, number: int, token_s: float, waiting_share: float) -> None:
        self.num_steps += 1
        self.token_s[number].add(token_s)
        if number == 1:
            self.waiting_share.add(waiting_share)
        if self.num_steps >= self.trial_from + TRIAL_STEPS:
            one, two = self.token_s[1], self.token_s[2]
            best = 2 if two.count and two.value < (1 - MIN_GAIN) * one.value else 1
            self.pause = FIRST_PAUSE if best != self.best else min(2 * self.pause, LONGEST_PAUSE)
            self.best = best
            self.trial_from = self.num_steps + self.pause


class MicroBatches:
    """Says how many to run next, and learns from what they took. One thread uses it."""

    def __init__(self) -> None:
        self._classes: dict[tuple[int, bool], _SizeClass] = {}

    def number_for(self, num_tokens: int, num_sequences: int) -> int:
        """1 or 2; a single sequence is never split."""
        return 1 if num_sequences < 2 else self._class_of(num_tokens, num_sequences).number()

    def observe(self, num_tokens: int, num_sequences: int, number: int, step_s: float, waited_s: float) -> None:
        """A step took step_s, of which it did nothing but wait for waited_s."""
        if num_sequences >= 2:
            self._class_of(num_tokens, num_sequences).observe(number, step_s / num_tokens, waited_s / step_s)

    def _class_of(self, num_tokens: int, num_sequences: int) -> _SizeClass:
        # Sizes of one class differ by at most a fifth; decode steps are apart from those with prompts.
        return self._classes.setdefault((round(4 * math.log2(num_tokens)), num_tokens == num_sequences), _SizeClass())
