"""`python -m tests.benchmarks.elasticity [--write] [--sensitivity]`: the table of node hours and its picture, in about two minutes.

`--sensitivity` makes the other table instead: the same search under other assumptions, many minutes.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.elasticity.constants import Constants, Replay
from tests.benchmarks.elasticity.hosts import ExpertHosts, read_traces
from tests.benchmarks.elasticity.picture import draw
from tests.benchmarks.elasticity.requests import Requests, read_requests, share_after_silence
from tests.benchmarks.elasticity.search import Found, Search
from tests.benchmarks.results import RESULTS, write_section
from tests.shared_data import shared_data

PICTURE = RESULTS.with_name("elasticity.svg")
HEADER = """| fleet (routers, hosts) | TTFT p99 | TPOT p99 | served | router-hours | host-hours | node-hours | saved by elastic |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
SENSITIVITY_HEADER = """`python -m tests.benchmarks.elasticity --sensitivity --write`: the table above with one assumption
changed at a time. The policy stays as it is there, the bounds are searched for
anew; where the elastic fleet cannot meet the targets, it says late.

| changed | fixed fleet | node-hours | elastic fleet | node-hours | TTFT p99 | TPOT p99 | saved |
| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"""
TRACE = "request_traces/azure_llm_2023_code.csv"
SILENCE_S = 10.0


def main() -> None:
    """Runs one of the two and prints it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="put the table and the picture beside the other results")
    arguments.add_argument("--sensitivity", action="store_true", help="the same under other assumptions")
    options = arguments.parse_args()
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s  {line}", flush=True)

    if options.sensitivity:
        title, text = "Elasticity under other assumptions", sensitivity(say)
    else:
        title, text = "Elasticity", compare(Constants(), PICTURE if options.write else None, say)
    print(text)
    if options.write:
        write_section(title, text)


def compare(constants: Constants, picture: Path | None, say: Callable[[str], None]) -> str:
    """The three fleets on the whole replay, as a table."""
    requests, search = prepare(constants, say)
    fixed = search.fixed()
    elastic, unit = search.elastic(fixed.shape), search.as_one_unit(fixed.shape)
    if picture is not None:
        draw(requests, fixed, elastic, picture)
    found = [(f"routers and hosts by their own load{_bounds(elastic)}", elastic), (f"smallest fixed fleet{_bounds(fixed)}", fixed)]
    ratio = unit.shape.unit or (0, 0)
    found.append((f"one unit of {ratio[0]} routers and {ratio[1]} hosts{_bounds(unit)}", unit))
    lines = [_line(name, each, elastic) for name, each in found]
    return "\n".join([_assumptions(constants, requests), "", HEADER, *lines, "", "![load, hosts and routers over the day](elasticity.svg)"])


def _assumptions(constants: Constants, requests: Requests) -> str:
    """What the table is a table of."""
    replay, cluster, policy, device = constants.replay, constants.cluster, constants.policy, constants.device
    targets = constants.targets
    paragraphs = (
        f"""`python -m tests.benchmarks.elasticity --write`: the product's policies, planner and replica choice in simulated time, with no
            process and no model. Azure's 2023 code trace, times x {replay.stretch:g} (its hour stands for a day), each request
            {replay.copies} times: {len(requests.arrival_s):,} requests, {requests.prompt.mean():.0f} prompt and
            {requests.answer.mean():.0f} answer tokens on average. Experts route as recorded, `law` for half of the day, then
            `translation`.""",
        f"""A node takes {cluster.node_start_s:g} s to start, {cluster.replica_start_s:g} s for its process, and the time to load its
            weights at {cluster.load_bytes_per_s / 1e9:g} GB/s; it is paid for from the request for it until {cluster.release_s:g} s
            after it has drained. An activated expert costs {device.alpha_s * 1e6:g} us, each of its tokens {device.beta_s * 1e6:g} us: a
            CPU's 5 ms and 0.2 ms, scaled. `tests/benchmarks/elasticity/constants.py` has every assumption with its source.""",
        f"""Each side is the cheapest found that has 99 of 100 requests under {targets.ttft_s:g} s to the first token and under
            {targets.tpot_s * 1e3:g} ms for each after it. The policy's targets (busy: hosts {policy.host_busy:g}, routers
            {policy.router_busy:g}) and cool-down ({policy.cooldown_s:g} s) were tried out on this trace, as the fixed fleet's size was.
            The saving is that of load which changes slower than a node starts: see the next section for the hour as it was.""",
    )
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def sensitivity(say: Callable[[str], None]) -> str:
    """The fixed and the elastic fleet under other assumptions, with the same policy."""
    base = Constants()
    variants = [
        ("node start 30 s", replace(base, cluster=replace(base.cluster, node_start_s=30.0))),
        ("node start 120 s", replace(base, cluster=replace(base.cluster, node_start_s=120.0))),
        ("half the rate", replace(base, replay=replace(base.replay, copies=12))),
        ("hour stretched to 6 hours", replace(base, replay=replace(base.replay, stretch=6.0, copies=6))),
        ("the hour as it was", replace(base, replay=Replay(stretch=1.0, copies=1))),
        ("each minute 24 times in a row, unstretched", replace(base, replay=Replay(stretch=1.0, copies=1, plays=24))),
    ]
    lines, fixed_fleets = [], dict[Replay, Found]()  # how long a node takes to start is nothing to a fixed fleet
    for name, constants in variants:
        say(name)
        _, search = prepare(constants, say)
        fixed = fixed_fleets[constants.replay] = fixed_fleets.get(constants.replay) or search.fixed()
        elastic = search.elastic(fixed.shape)
        late = "" if elastic.outcome.is_met else " late"
        lines.append(
            f"| {name} | {_bounds(fixed)[2:-1]} | {fixed.outcome.hours:.0f} | {_bounds(elastic)[2:-1]} | {elastic.outcome.hours:.0f} "
            f"| {elastic.outcome.ttft_p99_s:.2f} s{late} | {elastic.outcome.tpot_p99_s * 1e3:.0f} ms | {_saved(elastic, fixed)} |"
        )
        say(lines[-1])
    return "\n".join([SENSITIVITY_HEADER, *lines, "", _why_not_the_hour(base)])


def _why_not_the_hour(constants: Constants) -> str:
    """What the trace at its own pace leaves to a policy that does not know the future."""
    start_s = constants.cluster.node_start_s + constants.cluster.replica_start_s
    arrival_s = read_requests(shared_data(TRACE), Replay(stretch=1.0, copies=1)).arrival_s
    share = share_after_silence(arrival_s, SILENCE_S, start_s)
    return (
        f"The hour as it was is bursts out of silence: {share:.1%} of its requests come within {start_s:.0f} s, which is what a node takes "
        f"to start, of the first one after {SILENCE_S:.0f} s without any, and 1 in 100 may be late. Who does not know the future must have "
        "there what the next burst needs before it comes, and can let nothing go."
    )


def prepare(constants: Constants, say: Callable[[str], None], first: int | None = None) -> tuple[Requests, Search]:
    """The replay's requests (`first`: of so many rows of the trace), and a search over fleets that serve them."""
    requests = read_requests(shared_data(TRACE), constants.replay, first)
    hosts = ExpertHosts(constants, read_traces(shared_data("expert_traces")))
    return requests, Search(constants, hosts, requests, say)


def _line(name: str, found: Found, elastic: Found) -> str:
    outcome = found.outcome
    return (
        f"| {name} | {outcome.ttft_p99_s:.2f} s | {outcome.tpot_p99_s * 1e3:.0f} ms | {outcome.num_served:,} | {outcome.router_hours:.0f} "
        f"| {outcome.host_hours:.0f} | {outcome.hours:.0f} | {'' if found is elastic else _saved(elastic, found)} |"
    )


def _bounds(found: Found) -> str:
    roles = [f"{role.min}" if role.min == role.max else f"{role.min} to {role.max}" for role in (found.shape.routers, found.shape.hosts)]
    return f" ({roles[0]}, {roles[1]})"


def _saved(elastic: Found, other: Found) -> str:
    return f"{1 - elastic.outcome.hours / other.outcome.hours:.1%}"


if __name__ == "__main__":
    main()
