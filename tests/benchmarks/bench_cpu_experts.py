"""Routed experts on a CPU: the kernel beside torch, one layer of the benchmark model, alternating in one run.

    python -m tests.benchmarks.bench_cpu_experts

Layers take turns so that no layer's weights stay in the cache. Prints milliseconds (lower quartile) and the ratio.

Last table (2 cores of an AMD EPYC with AVX-512, both busy with other work; that makes torch with two threads useless as a
comparison, so only one thread is kept here):

    threads  storage   tokens  kernel ms  torch ms  ratio
          1  float32        1       1.28      1.52   1.18
          1  float32        8       8.41     13.92   1.65
          1  float32       32      14.70     28.17   1.92
          1  bfloat16       1       0.90      1.45   1.62
          1  bfloat16       8       2.82      6.97   2.47
          1  bfloat16      32       7.61     15.42   2.03
"""

import time

import torch

from model import experts as experts_module
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


def time_both(slots, num_tokens):
    """Seconds of one call, kernel and torch, lower quartile of alternating calls."""
    kernel_limit = experts_module.MAX_SMALL_GROUP
    times = {"kernel": [], "torch": []}
    for repeat in range(REPEATS):
        hidden = torch.randn(num_tokens, HIDDEN)
        ids = torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices
        weights = torch.rand(num_tokens, TOP_K)
        for side, limit in (("kernel", kernel_limit), ("torch", 0)):
            experts_module.MAX_SMALL_GROUP = limit
            started = time.perf_counter()
            slots.forward(repeat % LAYERS, hidden, ids, weights)
            times[side].append(time.perf_counter() - started)
    experts_module.MAX_SMALL_GROUP = kernel_limit
    return {side: sorted(values)[len(values) // 4] for side, values in times.items()}


def main():
    torch.manual_seed(0)
    print("threads  storage   tokens  kernel ms  torch ms  ratio")
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for dtype in (torch.float32, torch.bfloat16):
            slots = make_slots(dtype, num_threads)
            for num_tokens in (1, 8, 32):
                seconds = time_both(slots, num_tokens)
                kernel, plain = seconds["kernel"] * 1e3, seconds["torch"] * 1e3
                print(
                    f"{num_threads:7}  {str(dtype)[6:]:8}  {num_tokens:6}  {kernel:9.2f}  {plain:8.2f}  {plain / kernel:5.2f}", flush=True
                )


if __name__ == "__main__":
    main()
