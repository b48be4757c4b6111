"""A step's batch, one token at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.scheduler import Chunk


@dataclass
class SlowStep:
    """What `router.step.build_step` puts into tensors, in lists."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    rope_lengths: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    prompt_tokens: list[tuple[str, int, int]] = field(default_factory=list)  # request, position, row


def build_step_slowly(chunks: Sequence[Chunk], page_size: int) -> SlowStep:
    step = SlowStep()
    for chunk in chunks:
        sequence = chunk.sequence
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            is_prompt = position < sequence.num_prompt
            row = len(step.token_ids)
            step.token_ids.append(int(sequence.token_ids[position]))
            step.positions.append(position)
            step.slots.append(int(sequence.pages[position // page_size]) * page_size + position % page_size)
            step.rope_lengths.append(sequence.num_prompt if is_prompt else position + 1)
            judged = position + 1
            ranks_prompt = sequence.owes_prompt_logprobs and len(sequence.prompt_logprobs) <= judged < sequence.num_prompt
            samples = judged == sequence.num_tokens
            if ranks_prompt:
                step.prompt_tokens.append((sequence.request_id, judged, len(step.logit_rows)))
            if samples:
                step.sampled.append(sequence.request_id)
                step.sample_rows.append(len(step.logit_rows))
            if ranks_prompt or samples:
                step.logit_rows.append(row)
    return step
