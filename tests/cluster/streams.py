"""Greedy streams that run while something is done to the cluster: what came, when, and how sure the model was of each token."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from tests.cluster.conftest import App
from tests.tiny_models import assert_greedy_equal

STREAM_TIMEOUT_S = 240.0


@dataclass
class Stream:
    """One answer: its tokens, when each came (monotonic seconds), and by how much its logit led the next one's."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        """Between two tokens that follow each other, once the first eighth is there: before that, others' prompts are read."""
        settled = self.times[len(self.times) // 8 :]
        return max(later - earlier for earlier, later in itertools.pairwise(settled))


class Streams:
    """One stream for each prompt, all at once. An error of any is raised by `finish`."""

    def __init__(self, app: App, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        self._app = app
        self._num_tokens = num_tokens
        self._num_arrived = 0
        self._arrived = threading.Condition()
        self._pool = ThreadPoolExecutor(len(prompts))
        self.streams = [Stream() for _ in prompts]
        self._futures: list[Future[None]] = [
            self._pool.submit(self._run, list(prompt), stream) for prompt, stream in zip(prompts, self.streams, strict=True)
        ]

    def wait_for_tokens(self, number: int, timeout_s: float = 120.0) -> None:
        """Until so many tokens have arrived on all streams together."""
        with self._arrived:
            enough = self._arrived.wait_for(lambda: self._num_arrived >= number or self._failed(), timeout_s)
        assert enough, f"{self._num_arrived} tokens after {timeout_s} s"

    def finish(self) -> list[Stream]:
        """All of them, whole."""
        for future in self._futures:
            future.result(timeout=STREAM_TIMEOUT_S)
        self._pool.shutdown()
        assert all(len(stream.tokens) == self._num_tokens for stream in self.streams)
        return self.streams

    def _failed(self) -> bool:
        return any(future.done() and future.exception() is not None for future in self._futures)

    def _run(self, prompt: list[int], stream: Stream) -> None:
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=self._num_tokens, ignore_eos=True, logprobs=2)
        request = pb.GenerateRequest(model=self._app.name, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        with grpc.insecure_channel(self._app.grpc) as channel:
            for delta in rpc.InferenceStub(channel).Generate(request, timeout=STREAM_TIMEOUT_S, metadata=self._app.metadata):
                now = time.monotonic()
                stream.tokens += delta.token_ids
                stream.times += [now] * len(delta.token_ids)
                stream.margins += [position.top[0].logprob - position.top[1].logprob for position in delta.logprobs]
                with self._arrived:
                    self._num_arrived += len(delta.token_ids)
                    self._arrived.notify_all()


@dataclass(frozen=True)
class Disturbance:
    """What came of it: the longest gap between two tokens, the same of the undisturbed run, and where tied logits parted answers."""

    name: str
    longest_gap_s: float
    usual_gap_s: float
    ties: tuple[str, ...]
    recovered_s: float | None = None

    def __str__(self) -> str:
        recovered = "" if self.recovered_s is None else f", whole again after {self.recovered_s:.1f} s"
        return (
            f"{self.name}: longest gap {self.longest_gap_s:.2f} s, undisturbed {self.usual_gap_s:.2f} s, "
            f"{len(self.ties)} ties{recovered} {' '.join(self.ties)}"
        )


def disturbed(
    name: str,
    app: App,
    prompts: Sequence[Sequence[int]],
    undisturbed: Sequence[Stream],
    disturb: Callable[[], None],
    recovered: Callable[[], bool] | None = None,
    recover_timeout_s: float = 90.0,
) -> Disturbance:
    """Runs the prompts again, disturbs them at a quarter of the way; every answer must be the undisturbed one, but for ties.

    `recovered`, if given, must turn true in the time given; it is asked while streams still run.
    """
    num_tokens = len(undisturbed[0].tokens)
    streams = Streams(app, prompts, num_tokens)
    streams.wait_for_tokens(len(prompts) * num_tokens // 4)
    started = time.monotonic()
    disturb()
    recovered_s = None
    if recovered is not None:
        while not recovered():
            assert time.monotonic() - started < recover_timeout_s, f"{name}: not whole again after {recover_timeout_s} s"
            time.sleep(0.2)
        recovered_s = time.monotonic() - started
    answers = streams.finish()
    ties = []
    for number, (answer, expected) in enumerate(zip(answers, undisturbed, strict=True)):
        if tie := assert_greedy_equal(answer.tokens, expected.tokens, expected.margins):
            ties.append(f"stream {number} {tie}")
    longest, usual = (max(stream.longest_gap_s for stream in run) for run in (answers, undisturbed))
    return Disturbance(name, longest, usual, tuple(ties), recovered_s)
