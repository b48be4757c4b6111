"""Compiles all that Numba compiles, so that no process of a cluster has to: once on a machine, in an image, or at `make install`.

    python -m cluster.precompile

The machine code lies beside the sources, or where NUMBA_CACHE_DIR says.
"""

from cluster import placement
from model import cpu_experts
from model.experts import STORAGE_TYPES
from router import replica_choice


def main() -> None:
    """Half a minute the first time, nothing after."""
    placement.prepare()
    replica_choice.prepare()
    for dtype in STORAGE_TYPES:
        cpu_experts.prepare(dtype)


if __name__ == "__main__":
    main()
