"""The Coordinator's decisions as events of a time line: in which lane each stands, and whether it is good or bad news."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from cluster.decisions import QUIET

Lane = Literal["members", "scaling", "placement", "operations", "trouble"]
Tone = Literal["good", "plain", "warn", "bad"]
Line = Mapping[str, Any]

# By the decision's kind; what is not here is told plainly, beside the operations.
LANES: Mapping[str, tuple[Lane, Tone]] = {
    "member": ("members", "plain"),
    "publish": ("placement", "plain"),
    "plan": ("placement", "plain"),
    "rescue": ("trouble", "warn"),
    "failure": ("trouble", "bad"),
    "lease": ("trouble", "warn"),
    "epoch": ("trouble", "warn"),
    "store": ("trouble", "plain"),
    "operation": ("operations", "plain"),
    "scaling": ("scaling", "plain"),
    "closing": ("operations", "warn"),
}
# By the line's own `event`.
EVENTS: Mapping[str, tuple[Lane, Tone]] = {
    "host_joined": ("members", "good"),
    "router_joined": ("members", "good"),
    "host_left": ("members", "plain"),
    "router_left": ("members", "plain"),
    "host_lost": ("trouble", "bad"),
    "router_lost": ("trouble", "bad"),
}
# By what the sentence says, where a kind has both good and bad news and tells them by nothing else.
SAYINGS: tuple[tuple[str, str, tuple[Lane, Tone]], ...] = (
    ("member", " joined", ("members", "good")),  # as lines from before there were events still say
    ("member", "its lease ended", ("trouble", "bad")),
    ("plan", "cannot plan", ("trouble", "bad")),
    ("rescue", "have no room", ("trouble", "bad")),
    ("store", "going on without it", ("trouble", "bad")),
    ("store", "starting without it", ("trouble", "bad")),
    ("operation", " rolled back: ", ("operations", "warn")),
    ("operation", " done: ", ("operations", "good")),
)


def events_after(lines: Iterable[Line], number: int) -> list[dict[str, Any]]:
    """The events after `number`, oldest first: {n, time_unix_s, kind, text, lane, tone}; all of them if there is no such number yet."""
    told = [line for line in lines if line["kind"] not in QUIET]
    if told and told[-1]["n"] < number:
        number = 0
    return [_event(line) for line in told if line["n"] > number]


def _event(line: Line) -> dict[str, Any]:
    kind, text = line["kind"], line["text"]
    lane, tone = LANES.get(kind, ("operations", "plain"))
    if line.get("event") in EVENTS:
        lane, tone = EVENTS[line["event"]]
    else:
        said = (standing for said_kind, words, standing in SAYINGS if kind == said_kind and words in text)
        lane, tone = next(said, (lane, tone))
    return {"n": line["n"], "time_unix_s": line["time_unix_s"], "kind": kind, "text": text, "lane": lane, "tone": tone}
