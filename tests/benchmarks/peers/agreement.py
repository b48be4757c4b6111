"""Whether a side's greedy tokens are the oracle's."""

from collections.abc import Sequence
from dataclasses import dataclass

TIE = 1e-3  # difference of the two best logits below which either token is right


@dataclass(frozen=True)
class GreedyAnswer:
    """The oracle's: a prompt, the tokens that follow it, and at each the best logit less the second best."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]

    @property
    def num_compared(self) -> int:
        """Tokens before the first tie: past one, an answer may rightly go another way."""
        return next((position for position, gap in enumerate(self.gaps) if gap < TIE), len(self.gaps))


@dataclass(frozen=True)
class Agreement:
    """Tokens that are the oracle's, up to each answer's first that is not, of those compared."""

    num_same: int
    num_compared: int

    @property
    def counts(self) -> bool:
        return self.num_same == self.num_compared

    def __str__(self) -> str:
        return f"{self.num_same} of {self.num_compared}"


def agreement(oracle: Sequence[GreedyAnswer], answers: Sequence[Sequence[int]]) -> Agreement:
    """Of answers to the oracle's prompts, in its order. An answer that is too short agrees with nothing past its end."""
    same = compared = 0
    for right, tokens in zip(oracle, answers, strict=True):
        number = right.num_compared
        pairs = zip(right.tokens[:number], tokens, strict=False)
        differing = (position for position, (a, b) in enumerate(pairs) if a != b)
        same += next(differing, min(number, len(tokens)))
        compared += number
    return Agreement(same, compared)
