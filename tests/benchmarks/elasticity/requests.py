"""The Azure trace as arrays: when requests arrive, how long they are, and how their tokens route."""

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.elasticity.constants import Replay


@dataclass(frozen=True)
class Requests:
    """[N] each, by arrival: seconds, prompt and answer tokens. Ends with `span_s`."""

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    span_s: float


def read_requests(file: Path, replay: Replay, first: int | None = None) -> Requests:
    """The trace stretched and copied as `replay` says; `first` takes only so many of its rows."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))[:first]
    times = np.array([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
    prompt = np.array([max(1, int(row["ContextTokens"])) for row in rows])
    answer = np.array([max(1, int(row["GeneratedTokens"])) for row in rows])
    times -= times[0]
    if replay.plays > 1:
        times, prompt, answer = _play_minutes(times, prompt, answer, replay.plays)
    random = np.random.default_rng(replay.seed)
    within_s = random.random((replay.copies, len(times))) if replay.copies > 1 else np.zeros((1, len(times)))
    arrival_s = (replay.stretch * (times + within_s)).ravel()
    order = np.argsort(arrival_s, kind="stable")
    # A whole hour, as the trace is named, even where the last request comes before its end.
    span_s = max(replay.stretch * replay.plays * 3600.0 if first is None else 0.0, float(arrival_s.max()) + 60.0)
    return Requests(arrival_s[order], np.tile(prompt, replay.copies)[order], np.tile(answer, replay.copies)[order], span_s)


def share_after_silence(arrival_s: NDArray[np.float64], silence_s: float, within_s: float) -> float:
    """Of the requests, those that come no later than `within_s` after the first one that followed a silence."""
    begins = np.concatenate(([True], np.diff(arrival_s) >= silence_s))
    since_s = arrival_s - arrival_s[begins][np.cumsum(begins) - 1]
    return float((since_s <= within_s).mean())


def _play_minutes(times, prompt, answer, plays):
    """Minute m of the trace becomes minutes m x plays to (m + 1) x plays - 1, each with the same arrivals."""
    minutes = (times // 60).astype(int)
    again = np.arange(plays)[:, None] * 60.0 + (times + 60.0 * (plays - 1) * minutes)[None, :]
    order = np.argsort(again.ravel(), kind="stable")
    return again.ravel()[order], np.tile(prompt, plays)[order], np.tile(answer, plays)[order]
