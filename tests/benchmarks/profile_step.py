"""Where a decode step at 32 clients spends its time: router, both hosts and gateway sampled together, as one flame graph and a table.

    python -m tests.benchmarks.profile_step [--seconds 15] [--write]

The seeded benchmark checkpoint in bfloat16 behind `shoal serve` with two expert hosts. 32 streams begin together, and windows are
recorded while all of them decode and none is in its prompt; prompts of 64 and answers of 128 tokens, wave after wave.
"""

import argparse
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch

from cluster.client import model_id
from tests.benchmarks.benchmark_model import benchmark_checkpoint
from tests.benchmarks.growth.laws import Machine, StepLaw, step_law
from tests.benchmarks.growth.model import model_config, sizes_of
from tests.benchmarks.growth.sweeps import matrix_rate
from tests.benchmarks.peers.load import Answered, Order, run_load
from tests.benchmarks.peers.workload import Workload
from tests.benchmarks.profile_recording import START_S, Recording, core_seconds, machine_seconds, record
from tests.benchmarks.profile_report import STOLEN, STRANGERS, Profiled, draw_picture, report
from tests.benchmarks.results import machine, write_section
from tests.benchmarks.served import shoal_serving
from tests.benchmarks.throughput import read_bandwidth

PICTURE = Path(__file__).parent / "decode_step.svg"
CLIENTS, PROMPT_TOKENS, OUTPUT_TOKENS, WARM_TOKENS = 32, 64, 128, 16
WAVE_TIMEOUT_S = 300.0
MAX_WAVES, MAX_WINDOW_S = 40, 8


@dataclass(frozen=True)
class Pace:
    """Of a wave: seconds from its start until the last stream has its first token, and of a step after that."""

    first_s: float
    step_s: float


def pace_of(answers: list[Answered]) -> Pace:
    """As the streams' tokens came."""
    start = min(answer.sent_s for answer in answers)
    first_s = max(answer.token_s[0] for answer in answers) - start
    gaps = []
    for answer in answers:
        num_events = sum(at > start + first_s for at in answer.token_s)
        tokens_of_event = answer.num_tokens / len(answer.token_s)  # bytes that are no text yet wait for the next token
        gaps.append((answer.token_s[-1] - start - first_s) / (num_events * tokens_of_event))
    return Pace(first_s, statistics.median(gaps))


def is_decode_only(answers: list[Answered], began_s: float, ended_s: float) -> bool:
    """Whether all streams had their first token before the window and their last after it."""
    return all(answer.token_s[0] <= began_s and ended_s <= answer.token_s[-1] for answer in answers)


class Waves:
    """32 streams at a time against one server."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._model = model_id(url)
        self._workload = Workload(PROMPT_TOKENS, OUTPUT_TOKENS, CLIENTS)
        self._num_waves = 0

    def run(self, output_tokens: int, beside: Callable[[], None] = lambda: None) -> list[Answered]:
        """Asks, runs `beside` meanwhile, and answers with what came."""
        self._num_waves += 1
        bodies = self._workload.bodies(self._model, CLIENTS, f"wave {self._num_waves}", {}, output_tokens)
        order = Order(self._host, self._port, tuple(bodies), CLIENTS, WAVE_TIMEOUT_S)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(run_load, order)
            beside()
            return asked.result()

    def watched(self, pace: Pace, look: Callable[[int], None]) -> tuple[list[Answered], bool]:
        """A wave with `look(seconds)` in the middle of its decode; whether nothing but decode steps was seen."""
        seconds = min(MAX_WINDOW_S, max(1, int(0.55 * pace.step_s * OUTPUT_TOKENS - 2 * START_S)))
        seen: list[float] = []

        def beside() -> None:
            time.sleep(START_S + 1.3 * pace.first_s)  # the load generator's own start, and the prompts
            seen.append(time.perf_counter())
            look(seconds)
            seen.append(time.perf_counter())

        answers = self.run(OUTPUT_TOKENS, beside)
        is_pure = is_decode_only(answers, *seen)
        if not is_pure:
            first_s, last_s = max(answer.token_s[0] for answer in answers), min(answer.token_s[-1] for answer in answers)
            print(
                f"a window from {seen[0] - first_s:.1f} s after the last first token to {seen[1] - last_s:.1f} s after the first last one "
                "is left out",
                file=sys.stderr,
            )
        return answers, is_pure


def replicas(root: psutil.Process) -> dict[int, str]:
    """The processes on the token path by id: Router, ExpertHost 1, ExpertHost 2, Gateway, in this order."""
    found: dict[str, list[int]] = {"Router": [], "ExpertHost": [], "Gateway": []}
    for pid, (title, _) in core_seconds(root).items():
        replica = re.match(r"ray::ServeReplica:.*:(\w+)", title)
        if replica and replica[1] in found:
            found[replica[1]].append(pid)
    if not all(found.values()):
        raise RuntimeError(f"no process of {', '.join(name for name, pids in found.items() if not pids)} was found below this one")
    names: dict[int, str] = {}
    for name, pids in found.items():
        names |= {pid: name if len(pids) == 1 else f"{name} {number}" for number, pid in enumerate(sorted(pids), start=1)}
    return names


def profile(url: str, seconds: float, law: StepLaw) -> Profiled:
    """Waves without py-spy for the times, then waves with it until `seconds` are recorded."""
    waves, root = Waves(url), psutil.Process()
    pace = pace_of(waves.run(WARM_TOKENS))
    names = replicas(root)
    cores: list[tuple[str, float]] = []

    def count(window_s: int) -> None:
        before, whole_s, stolen_s = core_seconds(root), *machine_seconds()
        time.sleep(window_s)
        after, whole_after_s, stolen_after_s = core_seconds(root), *machine_seconds()
        for pid, (title, used_s) in after.items():
            cores.append((names.get(pid, title), (used_s - before.get(pid, ("", 0.0))[1]) / window_s))
        strangers = (whole_after_s - whole_s) / window_s - sum(used for _, used in cores)
        cores.extend([(STRANGERS, max(0.0, strangers)), (STOLEN, (stolen_after_s - stolen_s) / window_s)])

    plain, _ = waves.watched(pace, count)
    pace = pace_of(plain)
    print(f"a step takes {1e3 * pace.step_s:.1f} ms", file=sys.stderr)
    recordings = {pid: Recording() for pid in names}
    done_s = 0.0
    steps: list[float] = []
    for _ in range(MAX_WAVES):
        tried = {pid: Recording() for pid in names}
        answers, is_pure = waves.watched(pace, partial(record, tried))
        recorded = pace_of(answers)
        if is_pure:
            steps.append(recorded.step_s)
            for pid, recording in tried.items():
                recordings[pid].add(recording.stacks, recording.threads, recording.wall_s)
        else:
            pace = Pace(max(pace.first_s, recorded.first_s), min(pace.step_s, recorded.step_s))
        done_s = min(recording.wall_s for recording in recordings.values())
        print(f"recorded {done_s:.0f} s of {seconds:.0f}", file=sys.stderr)
        if done_s >= seconds:
            break
    else:
        raise RuntimeError(f"only {done_s:.0f} s of decode steps alone could be recorded in {MAX_WAVES} waves")
    by_name = {names[pid]: recording for pid, recording in recordings.items()}
    return Profiled(by_name, pace.step_s, statistics.median(steps), cores, law)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="to record")
    parser.add_argument("--picture", type=Path, help="draw into this file")
    parser.add_argument("--write", action="store_true", help="keep picture and table beside RESULTS.md")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that the server is ended with it
    rates = Machine(read_bandwidth(), matrix_rate())
    law = step_law(rates, sizes_of(model_config()), CLIENTS, PROMPT_TOKENS + OUTPUT_TOKENS // 2)
    with shoal_serving(benchmark_checkpoint(dtype=torch.bfloat16), "--expert-hosts", "2", "--max-model-len", "512") as url:
        profiled = profile(url, arguments.seconds, law)
    text = (
        f"`python -m tests.benchmarks.profile_step --write`: {CLIENTS} streams that all decode, prompts of {PROMPT_TOKENS} and answers of "
        f"{OUTPUT_TOKENS} tokens, the bfloat16 benchmark checkpoint, router, two hosts and gateway. {machine()}.\n\n{report(profiled)}"
    )
    print(text)
    if arguments.write or arguments.picture:
        draw_picture(profiled, PICTURE if arguments.write else arguments.picture)
    if arguments.write:
        write_section("Decode step at 32 clients", text)


if __name__ == "__main__":
    main()
