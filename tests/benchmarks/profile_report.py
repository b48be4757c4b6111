"""A profile as a table, a flame graph and sentences; all shares are of wall time, told as milliseconds of a step."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.flame_graph import Stack, draw, fold
from tests.benchmarks.growth.laws import StepLaw
from tests.benchmarks.profile_parts import GATEWAY, HOST, OTHERS, ROUTER, WAITING, Rules, part_of, shares, shortened, thread_of
from tests.benchmarks.profile_recording import RATE, Recording, ThreadTime

IN_C = "in its own C code"  # of a thread that Python sees parked
NATIVE = "threads without Python"
STRANGERS, STOLEN = "processes that are not Shoal's", "the machine's other tenants"
COLOURS = {
    WAITING: "#e5e7eb",
    "waiting for hosts": "#d1d5db",
    "dense products": "#fb923c",
    "attention": "#facc15",
    "latents read from the cache": "#fde68a",
    "gating": "#a3e635",
    "dispatch and combine": "#38bdf8",
    "experts kernel": "#f87171",
    "grouping, large groups": "#fca5a5",
    "frames in and out": "#7dd3fc",
    "sampling": "#c084fc",
    "scheduler and batch": "#d8b4fe",
    "norms, sums, activations": "#fdba74",
}
OTHER_COLOUR = "#cbd5a1"
MIN_MS_SHARE = 0.003  # of a step: less is not worth a row


@dataclass(frozen=True)
class Profiled:
    """Recordings by process name, seconds of a step without and under py-spy, cores used by every process without it, the law."""

    recordings: Mapping[str, Recording]
    step_s: float
    profiled_step_s: float
    cores: Sequence[tuple[str, float]]
    law: StepLaw


def rules_for(name: str) -> Rules:
    """By the process's name."""
    return {"Router": ROUTER, "ExpertHost": HOST, "Gateway": GATEWAY}[name.split()[0]]


def visible_stacks(recording: Recording, rules: Rules) -> dict[Stack, float]:
    """All that is not parked, in samples; and of parked threads and those without Python what the kernel says they ran."""
    active: dict[int, int] = {}
    parked: dict[int, tuple[str, int]] = {}
    stacks: dict[Stack, float] = {}
    for stack, samples in recording.stacks.items():
        number, name = thread_of(stack)
        if part_of(stack, rules) == WAITING:
            parked[number] = (name, parked.get(number, ("", 0))[1] + samples)
        else:
            active[number] = active.get(number, 0) + samples
            short = shortened(stack)
            stacks[short] = stacks.get(short, 0) + samples
    for number, (name, samples) in parked.items():
        ran = RATE * recording.threads.get(number, ThreadTime()).on_core_s - active.get(number, 0)
        if ran > 0:
            stack = (f"thread {name}", IN_C) if name else (NATIVE,)
            stacks[stack] = stacks.get(stack, 0) + min(ran, samples)
    unseen = sum(times.on_core_s for number, times in recording.threads.items() if number not in active and number not in parked)
    if unseen > 0:
        stacks[NATIVE,] = stacks.get((NATIVE,), 0) + RATE * unseen
    return stacks


def part_samples(recording: Recording, rules: Rules) -> dict[str, float]:
    """Samples by part, the rest of the wall time as WAITING; more than the wall time where several threads run at once."""
    found: dict[str, float] = dict(shares(recording.stacks, rules))
    found.pop(WAITING, None)
    for stack, samples in visible_stacks(recording, rules).items():
        if stack[-1] in (IN_C, NATIVE):
            found[OTHERS] = found.get(OTHERS, 0) + samples
    found[WAITING] = max(0.0, RATE * recording.wall_s - sum(found.values()))
    return found


def report(profiled: Profiled) -> str:
    """Picture, table, cores and sentences."""
    step_ms = 1e3 * profiled.step_s
    rows = ["| process | part | ms a step | share of wall time |", "| --- | --- | ---: | ---: |"]
    for name, recording in profiled.recordings.items():
        wall = RATE * recording.wall_s
        for part, samples in sorted(part_samples(recording, rules_for(name)).items(), key=lambda item: -item[1]):
            if samples >= MIN_MS_SHARE * wall:
                rows.append(f"| {name} | {part} | {step_ms * samples / wall:.2f} | {samples / wall:.1%} |")
    lines = ["![a decode step, process by process](decode_step.svg)", "", "\n".join(rows), "", sentences(profiled)]
    return "\n".join(lines)


def sentences(profiled: Profiled) -> str:
    """What a step takes against its law, where the router's engine stands still and why, and who has the cores."""
    law, router = profiled.law, profiled.recordings["Router"]
    engine = next(number for number, name in map(thread_of, router.stacks) if name == "engine")
    times = router.threads.get(engine, ThreadTime())
    wall_s, step_ms = router.wall_s, 1e3 * profiled.step_s
    asleep_s = max(0.0, wall_s - times.on_core_s - times.wants_core_s)
    parts = part_samples(router, ROUTER)
    waited = parts.get("waiting for hosts", 0.0) / RATE / wall_s
    hosts = [part_samples(recording, HOST) for name, recording in profiled.recordings.items() if name.startswith("ExpertHost")]
    kernel = [step_ms * host.get("experts kernel", 0.0) / RATE / wall_s for host in hosts]
    cores = ", ".join(f"{name} {used:.2f}" for name, used in group_cores(profiled.cores))
    total = sum(used for _, used in profiled.cores)
    return (
        f"A step takes {step_ms:.1f} ms ({1e3 * profiled.profiled_step_s:.1f} ms while py-spy samples; shares are told in the former); its "
        f"law is {1e3 * law.total_s:.1f} ms: dense {1e3 * law.dense_s:.1f}, experts {1e3 * law.experts_s:.1f}, attention "
        f"{1e3 * law.attention_s:.1f}. The engine's thread is on a core for {times.on_core_s / wall_s:.0%} of the time, finds none free "
        f"for {times.wants_core_s / wall_s:.0%} and sleeps for {asleep_s / wall_s:.0%}; it waits for hosts {step_ms * waited:.1f} ms of a "
        f"step, in which their kernels run for {' and '.join(f'{ms:.1f}' for ms in kernel)} ms. Cores used without py-spy, {total:.2f} in "
        f"all: {cores}."
    )


def group_cores(cores: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Ray's own processes as one, the least left out; most first."""
    sums: dict[str, float] = {}
    for title, used in cores:
        if title in (STRANGERS, STOLEN) or re.fullmatch(r"Router|Gateway|ExpertHost( \d+)?", title):
            name = title
        elif "peers.load" in title:
            name = "clients"
        elif ":Coordinator" in title:
            name = "Coordinator"
        else:
            name = "Ray and Serve"
        sums[name] = sums.get(name, 0.0) + used
    return sorted(((name, used) for name, used in sums.items() if used >= 0.005), key=lambda item: -item[1])


def draw_picture(profiled: Profiled, file: Path) -> None:
    """Each process as wide as the wall time, or as its threads together where that is more."""
    every: list[tuple[Stack, float]] = []
    for name, recording in profiled.recordings.items():
        rules = rules_for(name)
        stacks = visible_stacks(recording, rules)
        rest = RATE * recording.wall_s - sum(stacks.values())
        every += [((name, *stack), samples / recording.wall_s) for stack, samples in stacks.items()]
        if rest > 0:
            every.append(((name, WAITING), rest / recording.wall_s))
    step_ms = 1e3 * profiled.step_s

    def unit(samples: float) -> str:
        return f"{step_ms * samples / RATE:.2f} ms a step, {samples / RATE:.1%} of wall time"

    def colour(stack: Stack) -> str:
        if len(stack) == 1:
            return "#94a3b8"
        if stack[1] == WAITING:
            return COLOURS[WAITING]
        return COLOURS.get(part_of(stack[1:], rules_for(stack[0])), OTHER_COLOUR)

    note = "each process as wide as the wall time; grey: waiting; orange: dense; yellow: attention; red: experts; blue: dispatch, frames"
    draw(fold(every), f"A decode step at 32 clients: {step_ms:.1f} ms", note, unit, colour, file)
