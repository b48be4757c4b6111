"""What watching costs on the token path: `python -m tests.benchmarks.watch_cost` prints microseconds a delta of one token.

The same deltas go through a text service that counts and through one that does not, in turns; the median of the pairs' differences.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence

from cluster.api.fan import OnDelta
from cluster.api.service import Call, TextService
from cluster.metrics.request_log import RequestLog
from cluster.metrics.request_metrics import RequestMetrics
from cluster.metrics.watch import CallWatch, Watch
from router.request import Delta, Request

NUM_TOKENS = 2000
NUM_PAIRS = 30


class Router:
    """Says everything at once, so that nothing but the gateway's own work is timed."""

    async def generate(self, request: Request, on_delta: OnDelta) -> None:
        for position in range(NUM_TOKENS):
            on_delta(Delta(request.request_id, (5,), finish="length" if position == NUM_TOKENS - 1 else None))


class BlindCall(CallWatch):
    """Knows when the first token came, which an answer's timing needs, and nothing else."""

    def __init__(self, watch: Watch, plan) -> None:
        self.plan, self.requests, self.first_token_at = plan, plan.requests, {}

    def tokens(self, index: int, num: int, now: float) -> None:
        self.first_token_at.setdefault(index, now)

    def ended(self, *_: object) -> None:
        pass

    def close(self, now: float) -> None:
        pass


class Blind(Watch):
    def begin(self, plan) -> CallWatch:
        return BlindCall(self, plan)


async def seconds_of(watch: Watch) -> float:
    service = TextService("m", Router(), None, vocab_size=400, max_model_len=4 * NUM_TOKENS, watch=watch)
    plan = await service.plan(Call("id", prompts=((5, 6),), sampling={"max_tokens": NUM_TOKENS}))
    started = time.perf_counter()
    async for _ in service.run(plan):
        pass
    return time.perf_counter() - started


def microseconds(values: Sequence[float]) -> float:
    return 1e6 * statistics.median(values) / NUM_TOKENS


async def main() -> None:
    blind, counting, logging = Blind(), Watch(), Watch(log=RequestLog("m", lambda line: None))
    for watch in (blind, counting, logging):
        await seconds_of(watch)
    rows = [(await seconds_of(blind), await seconds_of(counting), await seconds_of(logging)) for _ in range(NUM_PAIRS)]
    print(f"gateway, a delta of one token: {microseconds([row[0] for row in rows]):.2f} us without watching")
    print(f"  counting adds {microseconds([row[1] - row[0] for row in rows]):+.2f} us")
    print(f"  with the log of requests {microseconds([row[2] - row[0] for row in rows]):+.2f} us")
    metrics = RequestMetrics()
    started = time.perf_counter()
    for _ in range(200_000):
        metrics.token_gap(0.0213)
    print(f"  token_gap alone: {(time.perf_counter() - started) / 0.2:.3f} us")
    started = time.perf_counter()
    for _ in range(1000):
        metrics.sums()
    print(f"a gateway's report of its sums, once a second: {1e3 * (time.perf_counter() - started):.0f} us")


if __name__ == "__main__":
    asyncio.run(main())
