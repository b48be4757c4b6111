"""`shoal bench`: a closed loop of streaming clients against a running application."""

import itertools
import random
import statistics
import threading
import time
from dataclasses import dataclass

from rich.table import Table

from cluster.client import model_id, post_events
from cluster.errors import RequestFailed

TOKEN_IDS = range(10, 200)  # every vocabulary has these


@dataclass(frozen=True)
class Load:
    """`clients` at once, each sends `requests` one after another; lengths in tokens."""

    clients: int
    prompt_tokens: int
    output_tokens: int
    requests: int


@dataclass(frozen=True)
class Result:
    """What was measured; times in seconds."""

    load: Load
    output_tokens_per_s: float
    first_token_p50_s: float
    between_tokens_p50_s: float
    between_tokens_p99_s: float


def measure(url: str, load: Load) -> Result:
    """Runs `load` against `url`. Raises RequestFailed if any request fails, since a failed run is no measurement."""
    model = model_id(url)
    firsts: list[float] = []
    gaps: list[float] = []
    counted: list[int] = []
    failures: list[Exception] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(load.requests):
                prompt = [draw.choice(TOKEN_IDS) for _ in range(load.prompt_tokens)]
                times, tokens = _one_request(url, model, prompt, load.output_tokens)
                counted.append(tokens)
                firsts.append(times[1] - times[0])
                gaps.extend(after - before for before, after in itertools.pairwise(times))
        except Exception as error:  # handed to the caller's thread below
            failures.append(error)

    threads = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in range(load.clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - started
    if failures:
        raise failures[0]
    ordered = sorted(gaps) or [0.0]
    return Result(
        load,
        sum(counted) / elapsed_s,
        statistics.median(firsts),
        statistics.median(ordered),
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    )


def table(results: list[Result]) -> Table:
    """One row a load."""
    shown = Table(title="closed loop, streaming /v1/completions", title_justify="left")
    for column in ("clients", "output tokens/s", "first token p50 ms", "between tokens p50 ms", "p99 ms"):
        shown.add_column(column, justify="right")
    for result in results:
        shown.add_row(
            str(result.load.clients),
            f"{result.output_tokens_per_s:.1f}",
            f"{1e3 * result.first_token_p50_s:.0f}",
            f"{1e3 * result.between_tokens_p50_s:.1f}",
            f"{1e3 * result.between_tokens_p99_s:.1f}",
        )
    return shown


def _one_request(url: str, model: str, prompt: list[int], output_tokens: int) -> tuple[list[float], int]:
    """Times of the start and of every event that brought text, and the tokens the server counted."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, tokens = [time.perf_counter()], 0
    for event in post_events(f"{url}/v1/completions", body):
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if event["choices"]:
            times.append(time.perf_counter())
    if len(times) == 1:
        raise RequestFailed(f"{url} answered without a token: nothing was measured")
    return times, tokens
