"""One knob grows, all else stays: the times of a step beside its law, on the full model and on one that is nothing but calls."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from model import cpu_threads
from model.experts import LocalExperts
from tests.benchmarks.growth.decoding import Decoding
from tests.benchmarks.growth.laws import Machine, Sizes, StepLaw, step_law
from tests.benchmarks.growth.model import Built, build_model, model_config

BATCH, CONTEXT, LAYERS, EXPERTS = 8, 64, 12, 64
THREADS = 2


@dataclass(frozen=True)
class Knobs:
    """What a point of a sweep is measured at."""

    batch: int = BATCH
    context: int = CONTEXT
    layers: int = LAYERS
    experts: int = EXPERTS


@dataclass(frozen=True)
class Measured:
    """Seconds of a step and, of it, inside `Experts`; `calls_s`: of the hollow model, at a short context. `activated`: experts of a
    layer. `page_faults` of a step."""

    value: int
    knobs: Knobs
    sizes: Sizes
    step_s: float
    experts_s: float
    calls_s: float
    activated: float
    page_faults: float


@dataclass(frozen=True)
class Point(Measured):
    """Beside what it should be."""

    law: StepLaw


def judge(machine: Machine, measured: Measured) -> Point:
    """Puts the law beside it."""
    law = step_law(machine, measured.sizes, measured.knobs.batch, measured.knobs.context)
    return Point(**vars(measured), law=law)


def quieter(first: Measured, second: Measured) -> Measured:
    """Of two passes: whatever else the machine does only slows a step."""
    better = first if first.step_s <= second.step_s else second
    return replace(better, calls_s=min(first.calls_s, second.calls_s))


@dataclass(frozen=True)
class Sweep:
    """`unit` follows a value in a sentence; `fixed` says what stays."""

    name: str
    unit: str
    fixed: str
    values: tuple[int, ...]
    knobs: Callable[[int], Knobs]


SWEEPS = (
    Sweep("batch", "sequences", "context 64, 12 layers, 64 experts", (1, 2, 4, 8, 16, 32, 64, 128, 256), lambda x: Knobs(batch=x)),
    Sweep(
        "context",
        "tokens of context",
        "batch 8, 12 layers, 64 experts",
        (64, 128, 256, 512, 1024, 2048, 4096, 8192),
        lambda x: Knobs(context=x),
    ),
    Sweep("layers", "layers", "batch 8, context 64, 64 experts", (4, 8, 16, 32, 48), lambda x: Knobs(layers=x)),
    Sweep("experts", "experts a layer", "batch 8, context 64, 12 layers", (8, 16, 32, 64, 128, 256), lambda x: Knobs(experts=x)),
)


class Models:
    """The last one built is kept: a sweep of batch or context needs one alone."""

    def __init__(self) -> None:
        self._key: tuple[int, int, bool] | None = None
        self._built: Built | None = None

    def get(self, knobs: Knobs, *, is_hollow: bool) -> Built:
        """Of these layers and experts."""
        key = (knobs.layers, knobs.experts, is_hollow)
        if self._built is None or key != self._key:
            self._built = None  # two at once may be more than there is memory
            self._built = build_model(model_config(knobs.layers, knobs.experts, is_hollow=is_hollow), THREADS)
            self._key = key
        return self._built


def run_sweep(sweep: Sweep, budget_s: float) -> Iterator[Measured]:
    """One pass over the full model, point by point with its hollow twin."""
    cpu_threads.allow(THREADS)
    torch.set_num_threads(1)  # as a router has it: torch's others stay awake after their work, on cores that the crew's need
    full, hollow = Models(), Models()
    for value in sweep.values:
        knobs = sweep.knobs(value)
        calls = _decode(hollow.get(knobs, is_hollow=True), replace(knobs, context=CONTEXT)).time(budget_s / 4)
        built = full.get(knobs, is_hollow=False)
        decoding = _decode(built, knobs)
        times = decoding.time(budget_s)
        activated = statistics.mean(len(set(ids.flatten().tolist())) for ids in decoding.choices())
        yield Measured(value, knobs, built.sizes, times.step_s, times.experts_s, calls.step_s, activated, times.page_faults)


def _decode(built: Built, knobs: Knobs) -> Decoding:
    return Decoding(built.model, LocalExperts(built.slots), knobs.batch, knobs.context)


def matrix_rate(size: int = 2048) -> float:
    """float32 operations a second of a large product, on all of torch's threads; best of five."""
    matrix = torch.randn(size, size)
    best_s = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s
