"""Output tokens a second on one checkpoint: our engine in this process, Shoal through HTTP, transformers.

    python -m tests.benchmarks.throughput [--sides engine,shoal,shoal-python-proxy,transformers] [--concurrency 1,8,32] [--write]

Closed loop: each of C clients sends its next request when the last one is answered; transformers gets the same prompts as static
batches of C, which is the best case for it, since all answers are of one length. Greedy, arithmetic in float32, prefill included.
Shoal's ingress is HAProxy, as in the manifests. The floor is what a decode step has to read (dense part, the experts that its tokens
activate, KV) at the measured bandwidth.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from cluster.client import model_id, post_events
from model import cpu_threads
from model.architectures import build, load_expert, read_config
from model.experts import Experts, ExpertSlots, LocalExperts
from model.gate import Routing
from model.loading import logical_experts
from model.weights import Checkpoint
from router.engine import Engine, EngineConfig
from router.request import Request, SamplingParams
from tests.benchmarks.benchmark_model import benchmark_checkpoint
from tests.benchmarks.results import machine, write_section
from tests.benchmarks.served import shoal_serving

Tokens: TypeAlias = list[int]
# Answers to prompts: all of them, by at most `concurrency` clients at once.
Side: TypeAlias = Callable[[list[Tokens], int], list[Tokens]]


@dataclass(frozen=True)
class Load:
    """Lengths in tokens; `rounds` of `requests_per_client` requests from each client, after one round that is not timed."""

    prompt_tokens: int
    output_tokens: int
    requests_per_client: int
    rounds: int
    vocab_size: int

    def prompts(self, concurrency: int, round_number: int) -> list[Tokens]:
        draw = random.Random(f"{concurrency}/{round_number}")
        number = concurrency * self.requests_per_client
        return [[draw.randrange(2, self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(number)]


class CountingExperts:
    """Passes everything on and counts the experts that each call of one token a sequence activates."""

    def __init__(self, experts: Experts, decode_tokens: int) -> None:
        self._experts = experts
        self._decode_tokens = decode_tokens
        self.activated: list[int] = []

    def dispatch(self, layer: int, hidden: torch.Tensor, routing: Routing) -> object:
        if len(hidden) == self._decode_tokens:
            self.activated.append(len(routing.expert_ids.unique()))
        return self._experts.dispatch(layer, hidden, routing)

    def combine(self, handle: object) -> torch.Tensor:
        return self._experts.combine(handle)

    def abandon(self, handle: object) -> None:
        self._experts.abandon(handle)


class LocalEngine:
    """Side one: Engine with LocalExperts in this process."""

    def __init__(self, directory: Path, load: Load) -> None:
        self._device = torch.device("cpu")
        self._load = load
        cpu_threads.allow(torch.get_num_threads())
        self._config, checkpoint = read_config(directory), Checkpoint(directory, self._device, torch.float32)
        self.model = build(self._config, checkpoint)
        stored = Checkpoint(directory, self._device)
        held = ((expert, load_expert(self._config, stored, expert)) for expert in logical_experts(self._config))
        slots = ExpertSlots(held, torch.get_num_threads())
        self.experts: Experts = LocalExperts(slots)
        self._expert_bytes = load_expert(self._config, stored, logical_experts(self._config)[0]).num_bytes

    def __call__(self, prompts: list[Tokens], concurrency: int, experts: Experts | None = None) -> list[Tokens]:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a router has it: torch's others stay awake after their work, on cores that the crew's need
        try:
            return self._answers(prompts, concurrency, experts or self.experts)
        finally:
            torch.set_num_threads(num_threads)

    def _answers(self, prompts: list[Tokens], concurrency: int, experts: Experts) -> list[Tokens]:
        load = self._load
        length = load.prompt_tokens + load.output_tokens
        sizes = EngineConfig(num_pages=concurrency * -(-length // 16) + 8, max_model_len=length)
        engine = Engine(self.model, experts, sizes, self._device)
        sampling = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True)
        waiting = list(enumerate(prompts))[::-1]
        answers: list[Tokens] = [[] for _ in prompts]
        num_open = 0
        while waiting or engine.has_work:
            while waiting and num_open < concurrency:
                number, prompt = waiting.pop()
                engine.add(Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling))
                num_open += 1
            for delta in engine.step():
                if delta.failure is not None:
                    raise RuntimeError(delta.failure.message)
                answers[int(delta.request_id)] += delta.token_ids
                num_open -= delta.finish is not None
        return answers

    def step_bytes(self, concurrency: int, prompts: list[Tokens]) -> tuple[float, float]:
        """Bytes that one decode step of `concurrency` sequences reads, and the experts it activates in a layer, both on average."""
        counting = CountingExperts(self.experts, concurrency)
        self(prompts[:concurrency], concurrency, counting)
        config, layout = self._config, self.model.cache_layout
        activated = statistics.mean(counting.activated)
        context = self._load.prompt_tokens + self._load.output_tokens / 2
        read = _dense_bytes(self.model) + len(config.moe_layers) * activated * self._expert_bytes
        return read + concurrency * context * layout.bytes_per_token, activated


def _dense_bytes(model: object) -> int:
    """Bytes of all tensors below `model` but its input embedding, of which a step reads a few rows."""
    seen: dict[int, int] = {}
    stack: list[object] = [value for name, value in vars(model).items() if name != "embedding"]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            seen[item.data_ptr()] = item.numel() * item.dtype.itemsize
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif type(item).__module__.startswith("model.") and hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(seen.values())


class Transformers:
    """Side three: static batches through generate()."""

    def __init__(self, directory: Path, load: Load) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="grouped_mm")
        self._model.eval()
        self._generation = GenerationConfig(max_new_tokens=load.output_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        self._model.generation_config = self._generation

    def __call__(self, prompts: list[Tokens], concurrency: int) -> list[Tokens]:
        answers: list[Tokens] = []
        for start in range(0, len(prompts), concurrency):
            token_ids = torch.tensor(prompts[start : start + concurrency])
            with torch.inference_mode():
                output = self._model.generate(token_ids, attention_mask=torch.ones_like(token_ids), generation_config=self._generation)
            answers += output[:, token_ids.shape[1] :].tolist()
        return answers


class ShoalOverHttp:
    """Side two: streams of a running `shoal serve`. Token ids do not come back in the stream; their number does."""

    def __init__(self, url: str, load: Load) -> None:
        self._url = url
        self._model_id = model_id(url)
        self._load = load

    def __call__(self, prompts: list[Tokens], concurrency: int) -> list[Tokens]:
        with ThreadPoolExecutor(concurrency) as clients:
            return list(clients.map(self._one, prompts))

    def _one(self, prompt: Tokens) -> Tokens:
        body = {
            "model": self._model_id,
            "prompt": prompt,
            "max_tokens": self._load.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_tokens = 0
        for event in post_events(f"{self._url}/v1/completions", body):
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
        return [0] * num_tokens


def tokens_per_s(side: Side, load: Load, concurrency: int) -> tuple[float, list[Tokens]]:
    """The best round, since what disturbs a round only slows it, and the last round's answers."""
    side(load.prompts(concurrency, 0)[:concurrency], concurrency)
    best, answers = 0.0, []
    for round_number in range(1, load.rounds + 1):
        prompts = load.prompts(concurrency, round_number)
        started = time.perf_counter()
        answers = side(prompts, concurrency)
        elapsed_s = time.perf_counter() - started
        wrong = [len(answer) for answer in answers if len(answer) != load.output_tokens]
        if wrong:
            raise RuntimeError(f"{len(wrong)} answers have not {load.output_tokens} tokens; the first has {wrong[0]}")
        best = max(best, len(prompts) * load.output_tokens / elapsed_s)
    return best, answers


def read_bandwidth() -> float:
    """Bytes a second that all threads of torch together read from memory; best of five."""
    values = torch.ones(1 << 27)
    best_s = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - started)
    return values.nbytes / best_s


@dataclass(frozen=True)
class Floor:
    """What a decode step reads on average, the experts it activates in a layer, and the tokens a second that bandwidth allows."""

    read_bytes: float
    activated: float
    tokens_per_s: float


def side_of(name: str, directory: Path, load: Load, serve_flags: list[str]) -> AbstractContextManager[Side]:
    """The side, started; what it holds is let go of when the context ends."""

    @contextmanager
    def in_process(kind: type[LocalEngine] | type[Transformers]) -> Iterator[Side]:
        yield kind(directory, load)

    @contextmanager
    def over_http(*, haproxy: bool) -> Iterator[Side]:
        with shoal_serving(directory, "--expert-hosts", "2", "--max-model-len", "512", *serve_flags, haproxy=haproxy) as url:
            yield ShoalOverHttp(url, load)

    kinds = {
        "engine": lambda: in_process(LocalEngine),
        "transformers": lambda: in_process(Transformers),
        "shoal": lambda: over_http(haproxy=True),
        "shoal-python-proxy": lambda: over_http(haproxy=False),
    }
    return kinds[name]()


SIDES = {
    "engine": "Engine, LocalExperts",
    "shoal": "Shoal, HTTP",
    "shoal-python-proxy": "Shoal, HTTP by Serve's Python proxy",
    "transformers": "transformers",
}


def table(results: dict[str, dict[int, float]], floors: dict[int, Floor], concurrency: list[int]) -> str:
    """Markdown: one row for each concurrency; ratios to transformers where it took part."""
    base = results.get("transformers")
    head = ["clients", *(SIDES[side] for side in results)]
    if base:
        head += [f"{SIDES[side]} / transformers" for side in results if side != "transformers"]
    if floors:
        head += ["decode floor", "experts a layer", "read a step"]
    rows = [head, ["---:"] * len(head)]
    for clients in concurrency:
        row = [str(clients), *(f"{results[side][clients]:.1f}" for side in results)]
        if base:
            row += [f"{results[side][clients] / base[clients]:.2f}" for side in results if side != "transformers"]
        if floors:
            floor = floors[clients]
            row += [f"{floor.tokens_per_s:.0f}", f"{floor.activated:.1f}", f"{floor.read_bytes / 1e6:.0f} MB"]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def agreement(first: list[Tokens], second: list[Tokens]) -> str:
    same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in zip(first, second, strict=True)]
    whole = sum(number == len(x) for number, x in zip(same, first, strict=True))
    return f"{whole} of {len(same)} answers are token for token those of transformers, the shortest common start is {min(same)} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint directory [default: the seeded benchmark model]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the seeded model")
    parser.add_argument("--sides", default="engine,shoal,transformers")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve-config", type=Path, help="YAML for `shoal serve --config`")
    parser.add_argument("--write", action="store_true", help="keep the table in RESULTS.md")
    arguments = parser.parse_args()
    directory = arguments.model or benchmark_checkpoint(dtype=getattr(torch, arguments.dtype))
    concurrency = [int(number) for number in arguments.concurrency.split(",")]
    load = Load(arguments.prompt_tokens, arguments.output_tokens, arguments.requests, arguments.rounds, read_config(directory).vocab_size)

    serve_flags = ["--config", str(arguments.serve_config)] if arguments.serve_config else []

    results: dict[str, dict[int, float]] = {}
    answers: dict[str, dict[int, list[Tokens]]] = {}
    floors: dict[int, Floor] = {}
    busy = os.getloadavg()[0]
    bandwidth = read_bandwidth()
    for name in arguments.sides.split(","):
        results[name], answers[name] = {}, {}
        with side_of(name, directory, load, serve_flags) as side:
            for clients in concurrency:
                results[name][clients], answers[name][clients] = tokens_per_s(side, load, clients)
                print(f"{SIDES[name]}, {clients} clients: {results[name][clients]:.1f} tokens/s", file=sys.stderr)
                if isinstance(side, LocalEngine):
                    read_bytes, activated = side.step_bytes(clients, load.prompts(clients, 0))
                    floors[clients] = Floor(read_bytes, activated, clients * bandwidth / read_bytes)

    lines = [
        f"Output tokens a second, prompts of {load.prompt_tokens} and answers of {load.output_tokens} tokens, closed loop, best of "
        f"{load.rounds} rounds; {directory.name}. {machine()}; memory read at {bandwidth / 1e9:.1f} GB/s; "
        f"load average before the run {busy:.1f}.",
        "",
        table(results, floors, concurrency),
    ]
    if {"engine", "transformers"} <= set(answers):
        lines += ["", "Engine against transformers:"]
        lines += [
            f"- {clients} clients: {agreement(answers['engine'][clients], answers['transformers'][clients])}." for clients in concurrency
        ]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        write_section("Throughput", text)


if __name__ == "__main__":
    main()
