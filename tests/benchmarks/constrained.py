"""What holding answers to a form costs: output tokens a second of one engine in this process, constrained against not, in one run.

    python -m tests.benchmarks.constrained [--checkpoint DIR] [--concurrency 1,8,32] [--write]

Both sides get the same prompts and generate the same number of tokens; their rounds alternate, and the ratio is the median of those of
neighbouring rounds. The schema is of a list that does not end within that number, of objects of strings, numbers and choices.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.architectures import build, load_expert, read_config
from model.experts import ExpertSlots, LocalExperts
from model.loading import logical_experts
from model.tokenizer import Tokenizer
from model.weights import Checkpoint
from router.constraint_compiler import GrammarCompiler
from router.constraint_matcher import MaskComputer, Matcher
from router.engine import Engine, EngineConfig
from router.request import Constraint, Request, SamplingParams
from router.sequence import Sequence as EngineSequence
from tests.benchmarks.benchmark_model import benchmark_checkpoint
from tests.benchmarks.results import machine, write_section

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 64
ENTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{1,20}@[a-z]{1,20}\\.org$"},
        "state": {"enum": ["new", "open", "waiting", "done"]},
        "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "state", "scores"],
    "additionalProperties": False,
}
CONSTRAINT = Constraint(kind="json_schema", value=json.dumps({"type": "array", "items": ENTRY, "minItems": 500}))


@dataclass(frozen=True)
class Row:
    """Tokens a second of both sides, the median ratio, and what one step's masks take by themselves, in milliseconds."""

    concurrency: int
    free: float
    constrained: float
    ratio: float
    mask_ms: float
    look_us: float  # what a step of unconstrained sequences spends on finding out that it is one


class Sides:
    """One engine's model, driven with and without the constraint."""

    def __init__(self, directory: Path) -> None:
        device = torch.device("cpu")
        config, checkpoint = read_config(directory), Checkpoint(directory, device, torch.float32)
        self._model = build(config, checkpoint)
        self._experts = LocalExperts(ExpertSlots((e, load_expert(config, checkpoint, e)) for e in logical_experts(config)))
        self._vocab_size = config.vocab_size
        started = time.perf_counter()
        tokenizer = Tokenizer(directory)
        self.grammars = GrammarCompiler(lambda: tokenizer, config.vocab_size, config.eos_token_ids)
        self.grammars.matcher(_request("a", (2,), Constraint(kind="regex", value="a")))
        self.load_s = time.perf_counter() - started
        started = time.perf_counter()
        self.grammars.matcher(_request("a", (2,), CONSTRAINT))
        self.compile_s = time.perf_counter() - started

    def seconds(self, concurrency: int, round_number: int, constraint: Constraint | None) -> float:
        """For `concurrency` answers of OUTPUT_TOKENS each, prefill included."""
        engine = self.engine(concurrency)
        for request in self.requests(concurrency, round_number, constraint):
            engine.add(request)
        num_tokens = 0
        started = time.perf_counter()
        while engine.has_work:
            for delta in engine.step():
                if delta.failure is not None:
                    raise RuntimeError(delta.failure.message)
                num_tokens += len(delta.token_ids)
        taken = time.perf_counter() - started
        if num_tokens != concurrency * OUTPUT_TOKENS:
            raise RuntimeError(f"{num_tokens} tokens instead of {concurrency * OUTPUT_TOKENS}: a side ended early")
        return taken

    def engine(self, concurrency: int) -> Engine:
        length = PROMPT_TOKENS + OUTPUT_TOKENS
        sizes = EngineConfig(num_pages=concurrency * -(-length // 16) + 8, max_model_len=length)
        return Engine(self._model, self._experts, sizes, torch.device("cpu"), grammars=self.grammars)

    def requests(self, concurrency: int, round_number: int, constraint: Constraint | None) -> list[Request]:
        draw = random.Random(f"{concurrency}/{round_number}")
        prompts = [tuple(draw.randrange(2, self._vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(concurrency)]
        return [_request(str(number), prompt, constraint) for number, prompt in enumerate(prompts)]

    def mask_ms(self, concurrency: int) -> float:
        """The median of a step's masks along the answers of a random walk through the grammar."""
        computer = MaskComputer(self._vocab_size)
        sequences = [EngineSequence(r, (), None, self.grammars.matcher(r)) for r in self.requests(concurrency, 0, CONSTRAINT)]
        rows = [(row, _of(sequence), sequence.sampling) for row, sequence in enumerate(sequences)]
        draw, taken = random.Random(0), []
        for _ in range(OUTPUT_TOKENS):
            started = time.perf_counter()
            with computer.computing(rows) as allowed:
                words = allowed.result().words
            taken.append(1e3 * (time.perf_counter() - started))
            bits = torch.from_numpy(words.view("uint8")[:, :, None] >> torch.arange(8, dtype=torch.uint8).numpy() & 1).flatten(1)
            for sequence, row in zip(sequences, bits, strict=True):
                sequence.append(draw.choice(row.nonzero().flatten().tolist()))
        return statistics.median(taken)

    def look_us(self, concurrency: int) -> float:
        """The time in which a step without constrained sequences finds that there is none."""
        sequences = [EngineSequence(r) for r in self.requests(concurrency, 0, None)]
        taken = []
        for _ in range(1000):
            started = time.perf_counter()
            any(sequence.matcher is not None for sequence in sequences)
            taken.append(1e6 * (time.perf_counter() - started))
        return statistics.median(taken)


def _of(sequence: EngineSequence) -> Matcher:
    assert sequence.matcher is not None
    return sequence.matcher


def _request(name: str, prompt: tuple[int, ...], constraint: Constraint | None) -> Request:
    sampling = SamplingParams(temperature=1.0, seed=len(name), max_tokens=OUTPUT_TOKENS, ignore_eos=True, constraint=constraint)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)


def measure(sides: Sides, concurrency: int, rounds: int) -> Row:
    """`rounds` of each side after one that is not timed, in turn."""
    sides.seconds(concurrency, 0, None)
    sides.seconds(concurrency, 0, CONSTRAINT)
    pairs = []
    for number in range(1, rounds + 1):
        pair = {c: sides.seconds(concurrency, number, c) for c in ((None, CONSTRAINT) if number % 2 else (CONSTRAINT, None))}
        pairs.append((pair[None], pair[CONSTRAINT]))
    num_tokens = concurrency * OUTPUT_TOKENS
    return Row(
        concurrency,
        free=num_tokens / statistics.median(free for free, _ in pairs),
        constrained=num_tokens / statistics.median(constrained for _, constrained in pairs),
        ratio=statistics.median(free / constrained for free, constrained in pairs),
        mask_ms=sides.mask_ms(concurrency),
        look_us=sides.look_us(concurrency),
    )


def table(rows: Sequence[Row], sides: Sides, directory: Path) -> str:
    lines = [
        f"{machine()}. `{directory.name}`, {PROMPT_TOKENS} tokens in and {OUTPUT_TOKENS} out, temperature 1, engine in one process. The",
        f"grammar's tables took {1e3 * sides.load_s:.0f} ms (once per router), a schema {1e3 * sides.compile_s:.1f} ms (once for each).",
        "A step's masks are computed beside its forward pass; the column is what they take alone.",
        "",
        "| sequences | free tokens/s | constrained tokens/s | constrained/free | masks of a step, ms | a free step looks, µs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.concurrency} | {row.free:.1f} | {row.constrained:.1f} | {row.ratio:.3f} | {row.mask_ms:.2f} | {row.look_us:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="instead of the benchmarks' own")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    options = parser.parse_args()
    directory = options.checkpoint or benchmark_checkpoint()
    sides = Sides(directory)
    rows = [measure(sides, int(concurrency), options.rounds) for concurrency in options.concurrency.split(",")]
    text = table(rows, sides, directory)
    print(text)
    if options.write:
        write_section("Constrained answers", text)


if __name__ == "__main__":
    main()
