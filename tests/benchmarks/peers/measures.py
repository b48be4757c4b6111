"""What the answers of one round tell: rates and latencies."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.benchmarks.peers.load import Answered


@dataclass(frozen=True)
class Round:
    """Tokens a second, of output and of prompts; seconds between events of a stream and to the first one."""

    output_per_s: float
    prompt_per_s: float
    itl_p50_s: float
    itl_p99_s: float
    ttft_p50_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; nan of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def measured(answers: Sequence[Answered], prompt_tokens: int, output_tokens: int) -> Round:
    """From the first request sent to the last [DONE]. An event that brings two tokens is one gap: a client waited that long.

    ValueError if an answer has not `output_tokens` tokens.
    """
    wrong = [each.num_tokens for each in answers if each.num_tokens != output_tokens]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(answers)} answers have not {output_tokens} tokens; the first has {wrong[0]}")
    elapsed_s = max(each.done_s for each in answers) - min(each.sent_s for each in answers)
    gaps = [after - before for each in answers for before, after in pairwise(each.token_s)]
    firsts = [each.token_s[0] - each.sent_s for each in answers if each.token_s]
    return Round(
        output_per_s=len(answers) * output_tokens / elapsed_s,
        prompt_per_s=len(answers) * prompt_tokens / elapsed_s,
        itl_p50_s=percentile(gaps, 0.5),
        itl_p99_s=percentile(gaps, 0.99),
        ttft_p50_s=statistics.median(firsts) if firsts else math.nan,
    )
