"""Routed experts on a CPU: the kernel beside torch, one layer of the benchmark model, alternating in one run.

    python -m tests.benchmarks.bench_cpu_experts

Layers take turns so that no layer's weights stay in the cache. Prints milliseconds (lower quartile) and the ratio.

The last table (2 cores of an AMD EPYC with AVX-512, memory read at 40 GB/s, torch's matrix products at 103 GFLOP/s a core):

    threads  storage   tokens  kernel ms  torch ms  ratio
          1  float32        1       0.42      1.13   2.70
          1  float32        8       1.90      5.59   2.94
          1  float32       32       3.61     11.57   3.21
          1  float32      512      17.90     38.85   2.17
          1  bfloat16       1       0.22      0.68   3.08
          1  bfloat16       8       1.25      4.22   3.37
          1  bfloat16      32       2.39      9.11   3.81
          1  bfloat16     512      16.87     35.70   2.12
"""

import time
from dataclasses import replace

import torch

from model.experts import ExpertSlots, ExpertWeights
from model.logical_expert import LogicalExpert

HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 512, 256, 64, 6, 4
REPEATS = 32


def make_slots(dtype, num_threads):
    generator = torch.Generator().manual_seed(0)
    return ExpertSlots(
        (
            (
                LogicalExpert(layer, expert),
                ExpertWeights(
                    (torch.randn(2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
                    (torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5).to(dtype),
                ),
            )
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        ),
        num_threads,
    )


def without_kernel(slots):
    """The same experts, one product of torch after another."""
    plain = ExpertSlots(num_threads=1)
    plain._layers = {layer: replace(held, table=None) for layer, held in slots._layers.items()}
    return plain


def time_both(slots, num_tokens):
    """Seconds of one call, kernel and torch, lower quartile of alternating calls."""
    sides = {"kernel": slots, "torch": without_kernel(slots)}
    times = {name: [] for name in sides}
    for repeat in range(REPEATS):
        hidden = torch.randn(num_tokens, HIDDEN)
        ids = torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices
        weights = torch.rand(num_tokens, TOP_K)
        for name, side in sides.items():
            started = time.perf_counter()
            side.forward(repeat % LAYERS, hidden, ids, weights)
            times[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 4] for name, values in times.items()}


def main():
    torch.manual_seed(0)
    print("threads  storage   tokens  kernel ms  torch ms  ratio")
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for dtype in (torch.float32, torch.bfloat16):
            slots = make_slots(dtype, num_threads)
            for num_tokens in (1, 8, 32, 512):
                seconds = time_both(slots, num_tokens)
                kernel, plain = seconds["kernel"] * 1e3, seconds["torch"] * 1e3
                print(
                    f"{num_threads:7}  {str(dtype)[6:]:8}  {num_tokens:6}  {kernel:9.2f}  {plain:8.2f}  {plain / kernel:5.2f}", flush=True
                )


if __name__ == "__main__":
    main()
