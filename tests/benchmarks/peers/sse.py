"""A streamed HTTP answer out of the reads that brought it: what came, and when."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Read = tuple[float, bytes]  # when it came, in seconds of time.perf_counter, and what


@dataclass(frozen=True)
class Event:
    """A server-sent event's JSON and when its last byte came."""

    at_s: float
    payload: dict[str, Any]


def status_of(reads: Sequence[Read]) -> int:
    """The answer's HTTP status."""
    return int(b"".join(data for _, data in reads).split(b" ", 2)[1])


def body_of(reads: Sequence[Read]) -> list[tuple[float, bytes]]:
    """The body without its chunk framing, in pieces, each with the time at which its last byte was there."""
    whole = b"".join(data for _, data in reads)
    ends, total = [], 0
    for _, data in reads:
        total += len(data)
        ends.append(total)

    def time_of(end: int) -> float:
        return reads[bisect_left(ends, end)][0]

    head_end = whole.index(b"\r\n\r\n") + 4
    if b"transfer-encoding: chunked" not in whole[:head_end].lower():
        starts = [head_end, *(end for end in ends if end > head_end)]
        return [(time_of(end), whole[start:end]) for start, end in pairwise(starts)]
    pieces, at = [], head_end
    while (line_end := whole.find(b"\r\n", at)) >= 0:
        size = int(whole[at:line_end].split(b";")[0], 16)
        if size == 0:
            break
        start = line_end + 2
        end = min(start + size, len(whole))
        pieces.append((time_of(end), whole[start:end]))
        at = start + size + 2
    return pieces


def events_of(reads: Sequence[Read]) -> list[Event]:
    """The events before [DONE]. ValueError if the status is not 200, an event is an error, or [DONE] did not come."""
    status = status_of(reads)
    pieces = body_of(reads)
    if status != 200:
        raise ValueError(f"status {status}: {b''.join(data for _, data in pieces)[:500].decode(errors='replace')}")
    events: list[Event] = []
    line = b""
    for at_s, data in pieces:
        *complete, line = (line + data).split(b"\n")
        for each in complete:
            if not each.startswith(b"data:"):
                continue
            text = each.removeprefix(b"data:").strip()
            if text == b"[DONE]":
                return events
            payload = json.loads(text)
            if "error" in payload:
                raise ValueError(f"failed in mid-stream: {payload['error']}")
            events.append(Event(at_s, payload))
    raise ValueError("the stream ended before [DONE]")


def token_times(events: Sequence[Event]) -> list[float]:
    """When each event that brings tokens came; one that only says why the answer ended, or only counts tokens, brings none."""
    times = []
    for event in events:
        choices = event.payload.get("choices") or []
        if any(choice.get("text") or choice.get("finish_reason") is None for choice in choices):
            times.append(event.at_s)
    return times


def completion_tokens(events: Sequence[Event]) -> int:
    """As the server counts them. ValueError if it does not say."""
    for event in reversed(events):
        usage = event.payload.get("usage")
        if usage:
            return int(usage["completion_tokens"])
    raise ValueError("the stream has no usage")
