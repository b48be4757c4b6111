"""transformers in float32: the greedy tokens that every side is held to, once for a checkpoint, in a process of its own.

python -m tests.benchmarks.peers.oracle CHECKPOINT ANSWERS.json
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.peers.agreement import GreedyAnswer
from tests.benchmarks.peers.environments import PEERS_DIRECTORY, run_logged

PROMPT_LENGTHS = (16, 32, 48, 64)
OUTPUT_TOKENS = 24
TIMEOUT_S = 600.0


def oracle_prompts(vocab_size: int) -> list[tuple[int, ...]]:
    """One of each length, the same for every side and run."""
    draw = random.Random("oracle")
    return [tuple(draw.randrange(2, vocab_size) for _ in range(length)) for length in PROMPT_LENGTHS]


def oracle_answers(checkpoint: Path) -> list[GreedyAnswer]:
    """Kept in build/peers; computed where they are not there."""
    kept = PEERS_DIRECTORY / f"oracle-{checkpoint.name}.json"
    if not kept.exists():
        print(f"transformers, float32: the greedy tokens of {checkpoint.name}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.benchmarks.peers.oracle", str(checkpoint), str(kept)]
        run_logged(command, kept.with_suffix(".log"), TIMEOUT_S, "the oracle")
    return [GreedyAnswer(tuple(each["prompt"]), tuple(each["tokens"]), tuple(each["gaps"])) for each in json.loads(kept.read_text())]


def _compute(checkpoint: Path) -> list[GreedyAnswer]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()
    answers = []
    for prompt in oracle_prompts(model.config.vocab_size):
        token_ids = list(prompt)
        gaps = []
        with torch.inference_mode():
            for _ in range(OUTPUT_TOKENS):  # no cache: nothing that a fast path shares
                best = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].topk(2)
                gaps.append(float(best.values[0] - best.values[1]))
                token_ids.append(int(best.indices[0]))
        answers.append(GreedyAnswer(prompt, tuple(token_ids[len(prompt) :]), tuple(gaps)))
    return answers


def main() -> None:
    checkpoint, kept = Path(sys.argv[1]), Path(sys.argv[2])
    text = json.dumps([asdict(each) for each in _compute(checkpoint)])
    partial = kept.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(kept)


if __name__ == "__main__":
    main()
