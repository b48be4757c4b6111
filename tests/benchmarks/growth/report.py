"""The section of RESULTS.md: a table for each sweep, its law in words, and a sentence made of its numbers on where it departs."""

from collections.abc import Sequence

from tests.benchmarks.growth.hosts import DELAY_S, LAYERS, VOCABULARY, HostsPoint
from tests.benchmarks.growth.laws import Machine, fit_line, hosts_law
from tests.benchmarks.growth.picture import CALLS, LAW, MEASURED, Curve, Panel
from tests.benchmarks.growth.sweeps import Point, Sweep

LAW_IN_WORDS = """\
The law of a step, in three parts one after another, each the longer of reading (bytes / {bandwidth:.1f} GB/s) and computing
(operations / {rate:.0f} GFLOP/s), both measured with two threads before and after the run, the better of them. Dense: every dense weight
read once, 2 operations for each of its numbers and each of the B sequences. Experts: in each of the L layers that have them
A = E (1 - (1 - K/E)^B) experts are read and 2 B K times an expert's numbers computed. Attention: B x context x latent bytes, and
2 x heads x (latent + rank) operations for each latent. Weights count as they are stored (bfloat16), latents as the cache has them.
"calls" is measured and part of no law: the same step on a model with as many layers, experts and choices of hardly any width at context
64, so what is left is the calls. A page fault is 4 KB that the process had given back to the kernel and is given anew, zeroed, in the
step."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweep_text(sweep: Sweep, points: Sequence[Point]) -> str:
    """Heading, table and sentence; times in milliseconds."""
    head = [sweep.name, "measured", "law", "measured / law", "calls", "measured / (law + calls)", "in experts", "law", "in the rest", "law"]
    head += ["experts activated", "law", "page faults"]
    rows = []
    for point in points:
        law, rest_s = point.law, point.step_s - point.experts_s
        times = (
            f"{1e3 * point.step_s:.1f}",
            f"{1e3 * law.total_s:.1f}",
            f"{point.step_s / law.total_s:.2f}",
            f"{1e3 * point.calls_s:.1f}",
            f"{point.step_s / (law.total_s + point.calls_s):.2f}",
        )
        parts = (point.experts_s, law.experts_s, rest_s, law.dense_s + law.attention_s)
        rows.append(
            [
                str(point.value),
                *times,
                *(f"{1e3 * part:.1f}" for part in parts),
                f"{point.activated:.1f}",
                f"{law.activated:.1f}",
                f"{point.page_faults:.0f}",
            ]
        )
    return f"### {sweep.name.capitalize()} ({sweep.fixed})\n\n{_table(head, rows)}\n\n{sweep_sentence(sweep, points)}"


def sweep_sentence(sweep: Sweep, points: Sequence[Point]) -> str:
    """How far measured and law are apart, what straight line joins them, how each grows, and which part departs most, and where."""
    ratios = [point.step_s / point.law.total_s for point in points]
    near, far = min(ratios), max(ratios)
    at_near, at_far = (points[ratios.index(value)] for value in (near, far))
    line = fit_line([point.law.total_s for point in points], [point.step_s for point in points])
    first, last = points[0], points[-1]
    grown, should = last.step_s / first.step_s, last.law.total_s / first.law.total_s
    steepest = max(range(1, len(points)), key=lambda i: ratios[i] / ratios[i - 1])
    before, after = points[steepest - 1], points[steepest]
    worse = ratios[steepest] / ratios[steepest - 1]
    jump = ""
    if worse > 1.1:
        jump = (
            f" It grows faster than its law most between {before.value} and {after.value} {sweep.unit} (x {worse:.2f}): "
            f"{_parts(before)} becomes {_parts(after)}{_faults(before, after)}."
        )
    return (
        f"From {first.value} to {last.value} {sweep.unit} a step grows {grown:.1f} times, by its law {should:.1f} times. It is nearest to "
        f"the law at {at_near.value} ({near:.2f}) and furthest at {at_far.value} ({far:.2f}), where it is {_parts(at_far)}, and the calls "
        f"alone are {1e3 * at_far.calls_s:.1f} ms. Best line through all: {1e3 * line.constant:.1f} ms + {line.slope:.2f} x law.{jump}"
    )


def _faults(before: Point, after: Point) -> str:
    """Where they are more than the odd ones."""
    return f"; page faults {before.page_faults:.0f} become {after.page_faults:.0f}" if after.page_faults > 1000 else ""


def _parts(point: Point) -> str:
    law = point.law
    rest_s, rest_law_s = point.step_s - point.experts_s, law.dense_s + law.attention_s
    experts = f"experts {1e3 * point.experts_s:.1f} ms (law {1e3 * law.experts_s:.1f})"
    return f"{experts} and the rest {1e3 * rest_s:.1f} ms (law {1e3 * rest_law_s:.1f})"


def host_laws(points: Sequence[HostsPoint]) -> list[float]:
    """Seconds of each point by its law; a batch's first point is that of one host."""
    alone = {point.batch: point.idle_s for point in reversed(points)}
    return [hosts_law(alone[point.batch], LAYERS - 1, DELAY_S, point.busiest) for point in points]


def hosts_text(points: Sequence[HostsPoint], overshoot_s: float) -> str:
    """The same for hosts."""
    head = [
        "batch",
        "hosts",
        "measured",
        "law",
        "measured / law",
        "without delay",
        "router's core",
        "a frame at a host, us",
        "busiest host's choices a layer",
        "if even",
    ]
    head += ["speed-up", "of the law"]
    rows = []
    ones: dict[int, tuple[float, float]] = {}
    for point, law_s in zip(points, host_laws(points), strict=True):
        one = ones.setdefault(point.batch, (point.step_s, law_s))
        times = (f"{1e3 * point.step_s:.1f}", f"{1e3 * law_s:.1f}", f"{point.step_s / law_s:.2f}", f"{1e3 * point.idle_s:.1f}")
        cores = (f"{1e3 * point.router_cpu_s:.1f}", f"{1e6 * point.host_cpu_s:.0f}")
        speed_up = (f"{one[0] / point.step_s:.2f}", f"{one[1] / law_s:.2f}")
        rows.append([str(point.batch), str(point.hosts), *times, *cores, f"{point.busiest:.1f}", f"{point.even:.1f}", *speed_up])
    words = (
        f"The law: the step on one host without delay, and {LAYERS - 1} layers x {1e6 * DELAY_S:.0f} us x the choices of the layer's "
        f"busiest host. Hosts sleep instead of computing, since cores end at two; {LAYERS} layers, of which {LAYERS - 1} have 64 experts, "
        f"each on one host; a vocabulary of {VOCABULARY}; torch has one thread, as in a router whose hosts share its cores."
    )
    return f"### Hosts (metered)\n\n{words}\n\n{_table(head, rows)}\n\n{hosts_sentence(points, overshoot_s)}"


def hosts_sentence(points: Sequence[HostsPoint], overshoot_s: float) -> str:
    """For each batch: the worst departure, what more hosts alone cost a hop, and what uneven routing takes."""
    sentences = []
    for batch in dict.fromkeys(point.batch for point in points):
        of_batch = [point for point in points if point.batch == batch]
        first, last = of_batch[0], of_batch[-1]
        laws = host_laws(of_batch)
        place = max(range(len(of_batch)), key=lambda i: of_batch[i].step_s / laws[i])
        worst, law_s = of_batch[place], laws[place]
        hop_us = 1e6 * (last.idle_s - first.idle_s) / (LAYERS - 1) / max(1, last.hosts - first.hosts)
        router_us = 1e6 * (last.router_cpu_s - first.router_cpu_s) / (LAYERS - 1) / max(1, last.hosts - first.hosts)
        sentences.append(
            f"Batch {batch}: furthest from the law at {worst.hosts} hosts, {1e3 * (worst.step_s - law_s):.1f} ms over it "
            f"({worst.step_s / law_s:.2f}). Without any delay each host more makes a layer {hop_us:.0f} us longer: "
            f"{router_us:.0f} us of the router's core and {1e6 * last.host_cpu_s:.0f} us of the host's, and all share two. The busiest "
            f"of {last.hosts} hosts has {last.busiest / last.even:.2f} times an even share."
        )
    layer_us = 1e6 * overshoot_s
    return (
        " ".join(sentences) + f" A sleep of 1 ms takes {layer_us:.0f} us longer than asked for, which each layer pays once and no law has."
    )


def law_in_words(machine: Machine) -> str:
    """Of all sweeps but that of hosts."""
    return LAW_IN_WORDS.format(bandwidth=machine.bytes_per_s / 1e9, rate=machine.operations_per_s / 1e9)


def sweep_panel(sweep: Sweep, points: Sequence[Point]) -> Panel:
    """Milliseconds: measured, law, and law with calls."""
    curves = (
        Curve("measured", MEASURED, tuple(1e3 * point.step_s for point in points), is_measured=True),
        Curve("law", LAW, tuple(1e3 * point.law.total_s for point in points)),
        Curve("law + calls", CALLS, tuple(1e3 * (point.law.total_s + point.calls_s) for point in points)),
    )
    return Panel(f"ms a step against {sweep.name}", sweep.fixed, tuple(point.value for point in points), curves)


def hosts_panel(points: Sequence[HostsPoint], batch: int) -> Panel:
    """Milliseconds of one batch."""
    of_batch = [point for point in points if point.batch == batch]
    curves = (
        Curve("measured", MEASURED, tuple(1e3 * point.step_s for point in of_batch), is_measured=True),
        Curve("law", LAW, tuple(1e3 * law_s for law_s in host_laws(of_batch))),
    )
    return Panel("ms a step against hosts", f"metered, batch {batch}", tuple(point.hosts for point in of_batch), curves)
