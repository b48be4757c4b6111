"""The table of one shape: every side, then Shoal against the best peer of each column."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.benchmarks.peers.side_run import Result

ASKED = {1: 1.0, 8: 2.0, 32: 2.0}
ASKED_PREFILL, ASKED_P99 = 1.2, 1.0
SHOAL = "shoal"


@dataclass(frozen=True)
class Column:
    """A figure of a result. `asked` is what Shoal's advantage over the best peer must be at least; None: nothing is asked."""

    title: str
    of: Callable[[Result], float]
    asked: float | None = None
    less_is_better: bool = False

    def best(self, results: Sequence[Result]) -> Result:
        return (min if self.less_is_better else max)(results, key=self.of)

    def advantage(self, ours: float, theirs: float) -> float:
        """Above 1 where ours is better."""
        return theirs / ours if self.less_is_better else ours / theirs


def columns(clients: Sequence[int]) -> list[Column]:
    most = max(clients)
    return [
        *(Column(f"{n} client{'s' * (n > 1)}, tokens/s", _output_rate(n), ASKED.get(n)) for n in clients),
        Column("prefill, tokens/s", lambda result: result.prefill.prompt_per_s, ASKED_PREFILL),
        Column(f"p99 gap at {most}, ms", lambda result: 1e3 * result.decode[most].itl_p99_s, ASKED_P99, less_is_better=True),
        Column(f"p50 gap at {most}, ms", lambda result: 1e3 * result.decode[most].itl_p50_s, less_is_better=True),
        Column(f"p50 first token at {most}, ms", lambda result: 1e3 * result.decode[most].ttft_p50_s, less_is_better=True),
    ]


def _output_rate(clients: int) -> Callable[[Result], float]:
    return lambda result: result.decode[clients].output_per_s


def results_table(results: Sequence[Result], clients: Sequence[int]) -> str:
    """Markdown: a row for each side; one whose tokens are not transformers' is there, and does not count."""
    shown = columns(clients)
    rows = [["engine", "precision", *(column.title for column in shown), "tokens as transformers'"]]
    rows.append(["---", "---", *["---:"] * len(shown), "---"])
    for result in results:
        agrees = str(result.agreement) + ("" if result.agreement.counts else ": does not count")
        rows.append([result.side.engine, result.side.precision, *(_figure(column.of(result)) for column in shown), agrees])
    return _markdown(rows)


def ratios_table(results: Sequence[Result], clients: Sequence[int]) -> str:
    """Markdown: Shoal, the best peer that counts, the advantage and what is asked of it. Empty without Shoal or without a peer."""
    ours = [result for result in results if result.side.engine == SHOAL and result.agreement.counts]
    peers = [result for result in results if result.side.engine != SHOAL and result.agreement.counts]
    if not ours or not peers:
        return ""
    rows = [["", "Shoal", "best peer", "", "Shoal's advantage", "asked", "met"], ["---", "---:", "---:", "---", "---:", "---:", "---"]]
    for column in columns(clients):
        if column.asked is None:
            continue
        best = column.best(peers)
        advantage = column.advantage(column.of(ours[0]), column.of(best))
        met = "yes" if advantage >= column.asked else "no"
        figures = [_figure(column.of(ours[0])), _figure(column.of(best)), best.side.name, f"{advantage:.2f}"]
        rows.append([column.title, *figures, f"{column.asked:.1f}", met])
    return _markdown(rows)


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
