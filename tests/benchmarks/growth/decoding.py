"""Decode steps of a full batch at a given context, timed: the prompts count as computed, over a cache of random latents."""

import resource
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.causal_lm import CausalLM
from model.experts import Experts
from model.gate import Routing
from router.engine import Engine, EngineConfig
from router.micro_batches import MicroBatches
from router.request import Request, SamplingParams
from tests.benchmarks.growth.model import PoolSource
from tests.fixed_micro_batches import Always

PAGE_SIZE = 16
WARM_UP_STEPS, RECORDED_STEPS = 4, 3
MIN_STEPS, MAX_STEPS = 7, 32


@dataclass(frozen=True)
class StepTimes:
    """Medians over the timed steps: a whole step, and of it the time inside `Experts`. This process's averages: seconds of a core, and
    pages that it had to be given, zeroed, since it had returned the like of them to the kernel."""

    step_s: float
    experts_s: float
    cpu_s: float
    page_faults: float
    num_steps: int  # timed or not


@dataclass
class WatchedExperts:
    """Passes everything on; adds up the time spent in there, and keeps the choices [T, K] of each layer while `keeps` is set."""

    experts: Experts
    seconds: float = 0.0
    keeps: bool = False
    choices: list[Tensor] = field(default_factory=list)

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> object:
        """As Experts."""
        if self.keeps:
            self.choices.append(routing.expert_ids.clone())
        started = time.perf_counter()
        handle = self.experts.dispatch(layer, hidden, routing)
        self.seconds += time.perf_counter() - started
        return handle

    def combine(self, handle: object) -> Tensor:
        """As Experts."""
        started = time.perf_counter()
        total = self.experts.combine(handle)
        self.seconds += time.perf_counter() - started
        return total

    def abandon(self, handle: object) -> None:
        """As Experts."""
        self.experts.abandon(handle)


class Decoding:
    """An engine in which `batch` sequences decode, each with about `context` tokens at the middle of the timed steps."""

    def __init__(self, model: CausalLM, experts: Experts, batch: int, context: int, micro_batches: MicroBatches | None = None) -> None:
        """In one micro-batch, unless told otherwise."""
        self.experts = WatchedExperts(experts)
        num_steps = WARM_UP_STEPS + MAX_STEPS + RECORDED_STEPS
        num_prompt = max(1, context - WARM_UP_STEPS - MAX_STEPS // 2)
        length = num_prompt + num_steps + 1
        config = EngineConfig(
            page_size=PAGE_SIZE,
            num_pages=batch * -(-length // PAGE_SIZE) + 8,
            max_batch_tokens=max(2048, batch),
            max_running=batch,
            max_waiting=batch,
            prefill_chunk=512,
            max_model_len=length,
        )
        self._engine = Engine(model, self.experts, config, torch.device("cpu"))
        self._engine._micro_batches = micro_batches or Always(1)
        source = PoolSource(torch.float32, seed=2)
        for entries in self._engine._cache.layers:
            for stored in entries:
                source.fill(stored)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 1, ignore_eos=True)
        tokens = torch.randint(2, model.config.vocab_size, (batch, num_prompt), generator=torch.Generator().manual_seed(3))
        for number, prompt in enumerate(tokens.tolist()):
            self._engine.add(Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling))
        # To compute the prompts would take longer than all that is measured; the cache has latents in their place.
        for sequence in self._engine._sequences.values():
            sequence.num_computed = sequence.num_tokens - 1
        self._batch = batch

    def time(self, budget_s: float) -> StepTimes:
        """Steps until `budget_s` is spent, but at least MIN_STEPS and at most MAX_STEPS, after the warm-up. Call it once."""
        for _ in range(WARM_UP_STEPS):
            self._step()
        steps: list[float] = []
        experts: list[float] = []
        faults, cpu_s, started = _page_faults(), time.process_time(), time.perf_counter()
        while len(steps) < MAX_STEPS and (len(steps) < MIN_STEPS or time.perf_counter() - started < budget_s):
            self.experts.seconds = 0.0
            began = time.perf_counter()
            self._step()
            steps.append(time.perf_counter() - began)
            experts.append(self.experts.seconds)
        cpu_s = (time.process_time() - cpu_s) / len(steps)
        faults = (_page_faults() - faults) / len(steps)
        return StepTimes(statistics.median(steps), statistics.median(experts), cpu_s, faults, WARM_UP_STEPS + len(steps))

    @property
    def split_share(self) -> float:
        """Of the steps so far, how many ran as two micro-batches."""
        return self._engine.load.num_split_steps / self._engine.load.num_steps

    def choices(self) -> list[Tensor]:
        """What was chosen, [batch, K] for every layer of some more steps."""
        self.experts.keeps = True
        for _ in range(RECORDED_STEPS):
            self._step()
        return self.experts.choices

    def _step(self) -> None:
        deltas = self._engine.step()
        failed = [delta.failure.message for delta in deltas if delta.failure is not None]
        if failed or len(deltas) != self._batch:
            raise RuntimeError(f"a step answered {len(deltas)} of {self._batch} sequences; {failed[:1]}")


def _page_faults() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
