"""What every side is asked: the lengths, and prompts that no side has seen before."""

import random
from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 32000
WARM_OUTPUT_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, and clients in a closed loop."""

    prompt_tokens: int
    output_tokens: int
    clients: int

    def prompts(self, number: int, label: str) -> list[list[int]]:
        """Random ids, the same for every side that is given this label; no two labels share a prompt."""
        draw = random.Random(f"{self.prompt_tokens}/{self.clients}/{label}")
        return [[draw.randrange(2, VOCAB_SIZE) for _ in range(self.prompt_tokens)] for _ in range(number)]

    def bodies(self, model: str, number: int, label: str, extra: dict[str, Any], output_tokens: int | None = None) -> list[dict[str, Any]]:
        """Requests for /v1/completions: greedy, streamed, of exactly `output_tokens`."""
        common = {
            "model": model,
            "max_tokens": output_tokens or self.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return [common | extra | {"prompt": prompt} for prompt in self.prompts(number, label)]


DECODE = Workload(prompt_tokens=64, output_tokens=64, clients=1)
PREFILL = Workload(prompt_tokens=512, output_tokens=1, clients=4)
