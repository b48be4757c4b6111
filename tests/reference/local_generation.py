"""A slow and obvious driver of a forward pass: one process, no scheduler, pages handed out in random order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.architectures import build, load_expert, read_config
from model.batch import Batch, Combine, Dispatch
from model.causal_lm import CausalLM
from model.experts import Experts, ExpertSlots, LocalExperts
from model.kv_cache import PagedCache
from model.logical_expert import LogicalExpert
from model.weights import Checkpoint
from router.gating import route


def run_forward(model: CausalLM, batch: Batch, cache: PagedCache, experts: Experts) -> Tensor:
    """Logits [R, V]: gates at each Dispatch, asks `experts`, answers each Combine."""
    forward = model.forward(batch, cache)
    answer: object = None
    try:
        while True:
            asked = forward.send(answer)
            if isinstance(asked, Dispatch):
                answer = experts.dispatch(asked.layer, asked.hidden, route(asked.hidden, asked.token_ids, model.gate(asked.layer)))
            else:
                assert isinstance(asked, Combine)
                answer = experts.combine(asked.handle)
    except StopIteration as end:
        logits: Tensor = end.value
        return logits


@dataclass
class LocalSequence:
    """One sequence: its tokens, and how many of them the cache has."""

    token_ids: list[int]
    prompt_len: int
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0


class LocalGenerator:
    """A model with all its experts, and sequences that are advanced by any number of tokens at a step."""

    def __init__(self, model: CausalLM, experts: Experts, page_size: int = 16, num_pages: int = 512) -> None:
        self.model = model
        self.experts = experts
        self.cache = PagedCache(model.cache_layout, num_pages, page_size, torch.device("cpu"))
        for entries in self.cache.layers:
            for entry in entries:  # what lies in unused slots must not matter
                entry.uniform_(-9, 9)
        self.free_pages = list(range(num_pages))
        random.Random(0).shuffle(self.free_pages)

    @classmethod
    def load(cls, directory: object, **options: int) -> "LocalGenerator":
        """From a checkpoint directory, in float32."""
        config = read_config(str(directory))
        checkpoint = Checkpoint(str(directory), dtype=torch.float32)
        all_experts = [LogicalExpert(layer, expert) for layer in config.moe_layers for expert in range(config.num_routed_experts)]
        slots = ExpertSlots((expert, load_expert(config, checkpoint, expert)) for expert in all_experts)
        return cls(build(config, checkpoint), LocalExperts(slots), **options)

    def step(self, work: Sequence[tuple[LocalSequence, int]]) -> list[Tensor]:
        """Advances each sequence by its number of tokens; the logits [n, V] of those tokens."""
        page_size = self.cache.page_size
        for sequence, count in work:
            while len(sequence.pages) * page_size < sequence.num_cached + count:
                sequence.pages.append(self.free_pages.pop())
        token_ids, positions, slots, rope_lengths = [], [], [], []
        for sequence, count in work:
            for position in range(sequence.num_cached, sequence.num_cached + count):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                slots.append(sequence.pages[position // page_size] * page_size + position % page_size)
                rope_lengths.append(max(sequence.prompt_len, position + 1))
        num_pages = max(len(sequence.pages) for sequence, _ in work)
        counts = [count for _, count in work]
        batch = Batch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.tensor([sequence.pages + [0] * (num_pages - len(sequence.pages)) for sequence, _ in work]),
            query_lens=tuple(counts),
            context_lens=tuple(sequence.num_cached + count for sequence, count in work),
            logit_rows=torch.arange(len(token_ids)),
            rope_lengths=torch.tensor(rope_lengths),
        )
        logits = run_forward(self.model, batch, self.cache, self.experts)
        for sequence, count in work:
            sequence.num_cached += count
        return list(logits.split(counts))

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int, chunk: int = 10_000) -> list[list[int]]:
        """Greedy tokens of each prompt, all in one ragged batch: long prompts are still read while short ones decode."""
        sequences = [LocalSequence(list(prompt), len(prompt)) for prompt in prompts]
        ends = [sequence.prompt_len + num_tokens for sequence in sequences]
        while active := [s for s, end in zip(sequences, ends, strict=True) if len(s.token_ids) < end]:
            work = [(sequence, min(chunk, len(sequence.token_ids) - sequence.num_cached)) for sequence in active]
            for (sequence, _), logits in zip(work, self.step(work), strict=True):
                if sequence.num_cached == len(sequence.token_ids):
                    sequence.token_ids.append(int(logits[-1].argmax()))
        for sequence in sequences:
            self.free_pages.extend(sequence.pages)
        return [sequence.token_ids[sequence.prompt_len :] for sequence in sequences]

    def prompt_logits(self, prompt: Sequence[int], chunk: int) -> Tensor:
        """Logits [T, V] of a whole prompt, read `chunk` tokens at a time."""
        sequence = LocalSequence(list(prompt), len(prompt))
        logits = []
        while sequence.num_cached < len(prompt):
            logits += self.step([(sequence, min(chunk, len(prompt) - sequence.num_cached))])
        self.free_pages.extend(sequence.pages)
        return torch.cat(logits)
