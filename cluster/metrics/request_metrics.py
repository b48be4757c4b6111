"""What one gateway counts of the answers that pass through it."""

from collections import Counter

from actors.metrics import Sums, histogram_sums
from cluster.metrics.catalogue import BOUNDS
from router.histogram import Histogram
from router.request import FinishReason

MAX_KINDS = 64  # kinds of failure are our own stable words; whatever else comes is counted as one
OTHER_KIND = "other"
FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # vLLM's words
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)


class RequestMetrics:
    """An answer is what one router generates for one prompt: a call with two prompts and n=3 counts six.

    The gateway's event loop counts; `sums` may be read by any thread. Times in seconds.
    """

    def __init__(self) -> None:
        self._histograms = {name: Histogram(BOUNDS[name]) for name in HISTOGRAMS}
        self._time_to_first_token = self._histograms["time_to_first_token_seconds"]
        self._inter_token_latency = self._histograms["inter_token_latency_seconds"]
        self._finished: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._num_arrived = 0
        self._num_ended = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_resubmitted = 0

    @property
    def num_open(self) -> int:
        """Answers under way."""
        return self._num_arrived - self._num_ended

    def arrived(self) -> None:
        """An answer is asked for."""
        self._num_arrived += 1

    def first_token(self, seconds: float, prompt_tokens: int = 0, num: int = 1) -> None:
        """Its first `num` tokens are there, `seconds` after the call arrived: the prompt is computed."""
        self._time_to_first_token.observe(seconds)
        self._num_prompt_tokens += prompt_tokens
        self._num_generated_tokens += num

    def token_gap(self, seconds: float, num: int = 1) -> None:
        """`num` more tokens, `seconds` after the ones before."""
        self._inter_token_latency.observe(seconds)
        self._num_generated_tokens += num

    def ended(self, finish: FinishReason, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        """An answer is over, `seconds` after its call arrived; the token counts are of the whole answer."""
        self._num_ended += 1
        self._finished[FINISHED[finish]] += 1
        histograms = self._histograms
        histograms["e2e_request_latency_seconds"].observe(seconds)
        histograms["request_prompt_tokens"].observe(prompt_tokens)
        histograms["request_generation_tokens"].observe(generated_tokens)

    def resubmitted(self) -> None:
        """An answer goes on at another router, since its own died."""
        self._num_resubmitted += 1

    def failed(self, kind: str) -> None:
        """A call was refused or failed, by the stable kind of its error."""
        known = kind in self._failures or len(self._failures) < MAX_KINDS
        self._failures[kind if known else OTHER_KIND] += 1

    def sums(self) -> Sums:
        """Everything since the gateway began."""
        sums: Sums = {
            ("requests_total",): float(self._num_arrived),
            ("prompt_tokens_total",): float(self._num_prompt_tokens),
            ("generation_tokens_total",): float(self._num_generated_tokens),
            ("request_resubmissions_total",): float(self._num_resubmitted),
        }
        sums |= {("request_success_total", reason): float(count) for reason, count in self._finished.copy().items()}
        sums |= {("request_failures_total", kind): float(count) for kind, count in self._failures.copy().items()}
        for name, histogram in self._histograms.items():
            sums |= histogram_sums(name, histogram)
        return sums
