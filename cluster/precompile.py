"""Compiles all that Numba compiles, so that no process of a cluster has to: once on a machine, in an image, or at `make install`.

    python -m cluster.precompile

The machine code lies beside the sources, or where NUMBA_CACHE_DIR says.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from cluster import placement
from model import (
    cpu_add,
    cpu_attention,
    cpu_experts,
    cpu_gate,
    cpu_norm,
    cpu_prefill,
    cpu_product,
    cpu_recording,
    cpu_rope,
    cpu_silu,
    cpu_threads,
)
from model.weights import STORED_DTYPES
from router import quick_batches, replica_choice
from router.transport import in_place


def main() -> None:
    """Half a minute the first time, nothing after. The planner takes half of it: the others are compiled beside it."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as compilers:
        running = [compilers.submit(placement.prepare), compilers.submit(_prepare_token_path, STORED_DTYPES)]
        for compiler in running:
            compiler.result()


def _prepare_token_path(dtypes: tuple[torch.dtype, ...]) -> None:
    replica_choice.prepare()
    quick_batches.prepare()
    in_place.prepare()
    cpu_add.prepare()
    cpu_attention.prepare_grouped()
    cpu_gate.prepare()
    cpu_norm.prepare()
    cpu_prefill.prepare()
    cpu_recording.prepare()
    cpu_rope.prepare_heads()
    cpu_rope.prepare_latents()
    cpu_silu.prepare()
    cpu_threads.prepare()
    for dtype in dtypes:
        cpu_product.prepare(dtype)
        cpu_attention.prepare_latent(dtype)
        cpu_experts.prepare(dtype)


if __name__ == "__main__":
    main()
