"""What this machine could do at best: how fast it reads and multiplies, and what a step of a checkpoint must read and multiply.

    python -m tests.benchmarks.peers.floors CHECKPOINT CLIENTS[,CLIENTS...] COSTS.json

Attention over the context is left out: at these lengths its products are under a hundredth of the operations, its cache 2 to 6 % of the
bytes.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch

from tests.benchmarks.peers.environments import PEERS_DIRECTORY, run_logged
from tests.benchmarks.peers.workload import DECODE, PREFILL
from tests.benchmarks.throughput import Load, LocalEngine, read_bandwidth

NUM_THREADS, MATRIX_SIZE, NUM_TRIES = 2, 2048, 5
TIMEOUT_S = 600.0
ROUTED = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Machine:
    """Bytes a second read, and operations a second of a large matrix product in float32 and in bfloat16; two threads."""

    read_per_s: float
    float32_per_s: float
    bfloat16_per_s: float


@dataclass(frozen=True)
class Costs:
    """Of one checkpoint in float32: bytes of weights that a decode step of so many clients reads, experts it activates a layer, parameters.

    `active` are those that one token is multiplied by; `head` the part of them that a prompt's last token alone needs.
    """

    step_bytes: dict[int, float]
    activated: dict[int, float]
    parameters: int
    active: int
    head: int


def measured_machine() -> Machine:
    """Now, on an idle machine; best of five each."""
    torch.set_num_threads(NUM_THREADS)
    return Machine(read_bandwidth(), _matrix_rate(torch.float32), _matrix_rate(torch.bfloat16))


def _matrix_rate(dtype: torch.dtype) -> float:
    """The better of ATen's product (MKL's in float32) and oneDNN's of a weight in its own order: MKL is slow on AMD."""
    hidden, weight = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype), torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
    ways: list[Callable[[], torch.Tensor]] = [lambda: hidden @ weight]
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, MATRIX_SIZE)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], ""))
    best_s = float("inf")
    for way in ways:
        for _ in range(NUM_TRIES):
            started = time.perf_counter()
            way()
            best_s = min(best_s, time.perf_counter() - started)
    return 2 * MATRIX_SIZE**3 / best_s


def costs_of(checkpoint: Path, clients: Sequence[int]) -> Costs:
    """Counted once by our engine in a process of its own, and kept in build/peers."""
    kept = PEERS_DIRECTORY / f"costs-{checkpoint.name}-{'-'.join(str(number) for number in clients)}.json"
    if not kept.exists():
        command = [sys.executable, "-m", "tests.benchmarks.peers.floors", str(checkpoint), ",".join(str(n) for n in clients), str(kept)]
        run_logged(command, kept.with_suffix(".log"), TIMEOUT_S, "counting what a step reads")
    values = json.loads(kept.read_text())
    for name in ("step_bytes", "activated"):
        values[name] = {int(number): value for number, value in values[name].items()}
    return Costs(**values)


def read_parameters(shapes: Mapping[str, Sequence[int]], num_experts: int, activated: float) -> float:
    """Of all tensors but the input embedding, of which a token reads a row; of the routed experts so many a layer."""
    dense = sum(prod(shape) for name, shape in shapes.items() if not ROUTED.search(name) and "embed_tokens" not in name)
    routed = sum(prod(shape) for name, shape in shapes.items() if ROUTED.search(name))
    return dense + routed * activated / num_experts


def table(machine: Machine, costs: Costs, clients: Sequence[int]) -> str:
    """Markdown: tokens a second that reading and multiplying allow, each alone."""
    head = ["floor", *(f"{number} client{'s' * (number > 1)}" for number in clients), "prefill"]
    rows = [head, ["---", *["---:"] * (len(clients) + 1)]]
    prompt_tokens = PREFILL.clients * PREFILL.prompt_tokens
    whole_bytes = 4 * costs.parameters
    for name, share in (("float32", 1.0), ("bfloat16", 0.5)):
        decode = [number * machine.read_per_s / (share * costs.step_bytes[number]) for number in clients]
        prefill = prompt_tokens * machine.read_per_s / (share * whole_bytes)
        rows.append([f"reading, {name}, tokens/s", *(f"{rate:.0f}" for rate in (*decode, prefill))])
    for name, rate in (("float32", machine.float32_per_s), ("bfloat16", machine.bfloat16_per_s)):
        decode_rate, prefill_rate = rate / (2 * costs.active), rate / (2 * (costs.active - costs.head))
        rows.append([f"multiplying, {name}, tokens/s", *[f"{decode_rate:.0f}"] * len(clients), f"{prefill_rate:.0f}"])
    rows.append(["read a step, float32, MB", *(f"{costs.step_bytes[number] / 1e6:.0f}" for number in clients), f"{whole_bytes / 1e6:.0f}"])
    rows.append(["experts a layer", *(f"{costs.activated[number]:.1f}" for number in clients), "all"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _count(checkpoint: Path, clients: Sequence[int]) -> Costs:
    from safetensors import safe_open

    from model.architectures import read_config

    shapes: dict[str, Sequence[int]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118 - no mapping
    config = read_config(checkpoint)
    torch.set_num_threads(NUM_THREADS)
    load = Load(DECODE.prompt_tokens, DECODE.output_tokens, 1, 1, config.vocab_size)
    engine = LocalEngine(checkpoint, load)
    activated = {number: engine.step_bytes(number, load.prompts(number, 0))[1] for number in clients}
    return Costs(
        step_bytes={number: 4 * read_parameters(shapes, config.num_routed_experts, activated[number]) for number in clients},
        activated=activated,
        parameters=sum(prod(shape) for shape in shapes.values()),
        active=round(read_parameters(shapes, config.num_routed_experts, config.num_experts_per_tok)),
        head=prod(shapes["lm_head.weight"]),
    )


def main() -> None:
    clients = [int(number) for number in sys.argv[2].split(",")]
    Path(sys.argv[3]).write_text(json.dumps(asdict(_count(Path(sys.argv[1]), clients))))


if __name__ == "__main__":
    main()
