"""One side alone: started, held to the oracle, warmed up, measured, ended."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.peers.agreement import Agreement, GreedyAnswer, agreement
from tests.benchmarks.peers.environments import PeerFailed
from tests.benchmarks.peers.load import Order, run_load
from tests.benchmarks.peers.measures import Round, measured
from tests.benchmarks.peers.server import Endpoint
from tests.benchmarks.peers.sides import Side
from tests.benchmarks.peers.workload import DECODE, PREFILL, WARM_OUTPUT_TOKENS, Workload

ROUND_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Plan:
    """`rounds` of `requests` from each client; the best round is kept, since what disturbs a round only slows it."""

    clients: tuple[int, ...]
    requests: int
    rounds: int


@dataclass(frozen=True)
class Result:
    """A side's best rounds: by clients, and of prefill."""

    side: Side
    agreement: Agreement
    decode: dict[int, Round]
    prefill: Round


def run_side(side: Side, checkpoint: Path, oracle: Sequence[GreedyAnswer], plan: Plan) -> Result:
    """One that does not agree is measured in one round, for the reader. Raises PeerFailed."""
    print(f"{side.name}: starting", flush=True)
    with side.start(checkpoint) as endpoint:
        with ThreadPoolExecutor(len(oracle)) as asking:
            answers = list(asking.map(lambda right: side.greedy(endpoint, list(right.prompt), len(right.tokens)), oracle))
        agrees = agreement(oracle, answers)
        print(f"{side.name}: {agrees} tokens are those of transformers in float32", flush=True)
        rounds = plan.rounds if agrees.counts else 1
        decode = {}
        for clients in plan.clients:
            decode[clients] = _best(side, endpoint, replace(DECODE, clients=clients), plan.requests, rounds)
            print(f"{side.name}: {clients} clients, {_said(decode[clients])}", flush=True)
        prefill = _best(side, endpoint, PREFILL, plan.requests, rounds)
        print(f"{side.name}: prefill, {prefill.prompt_per_s:.1f} prompt tokens/s", flush=True)
    return Result(side, agrees, decode, prefill)


def _best(side: Side, endpoint: Endpoint, workload: Workload, requests: int, rounds: int) -> Round:
    output_tokens = min(workload.output_tokens, WARM_OUTPUT_TOKENS)
    _ask(side, endpoint, workload, workload.bodies(endpoint.model, workload.clients, "warm-up", side.extra, output_tokens), output_tokens)
    measured_rounds = []
    for number in range(rounds):
        bodies = workload.bodies(endpoint.model, requests * workload.clients, str(number), side.extra)
        measured_rounds.append(_ask(side, endpoint, workload, bodies, workload.output_tokens))
    return max(measured_rounds, key=lambda each: each.output_per_s)


def _ask(side: Side, endpoint: Endpoint, workload: Workload, bodies: list[dict[str, object]], output_tokens: int) -> Round:
    answers = run_load(Order(endpoint.host, endpoint.port, tuple(bodies), workload.clients, ROUND_TIMEOUT_S))
    try:
        return measured(answers, workload.prompt_tokens, output_tokens)
    except ValueError as error:
        raise PeerFailed(f"{side.name}, {workload.clients} clients: {error}") from error


def _said(best: Round) -> str:
    return (
        f"{best.output_per_s:.1f} tokens/s, gaps p50 {1e3 * best.itl_p50_s:.0f} ms and p99 {1e3 * best.itl_p99_s:.0f} ms, "
        f"first token p50 {1e3 * best.ttft_p50_s:.0f} ms"
    )
