"""Clients that ask again and again until told to stop: how many answers came, and that each is the right one."""

import threading
import time
from collections.abc import Sequence

import grpc

from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from tests.cluster.conftest import App

CALL_TIMEOUT_S = 120.0


def ask(app: App, stub: rpc.InferenceStub, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy answer."""
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    request = pb.GenerateRequest(model=app.name, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    return [token for delta in stub.Generate(request, timeout=CALL_TIMEOUT_S, metadata=app.metadata) for token in delta.token_ids]


def ask_all(app: App, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> dict[tuple[int, ...], list[int]]:
    """Each prompt's greedy answer, asked one after another."""
    with grpc.insecure_channel(app.grpc) as channel:
        stub = rpc.InferenceStub(channel)
        return {prompt: ask(app, stub, prompt, num_tokens) for prompt in prompts}


class Load:
    """Context manager: `num_clients` closed loops over the prompts, beginning at `started`. Errors and wrong answers are kept.

    Each client rests for `pause_s` after an answer.
    """

    def __init__(
        self, app: App, answers: dict[tuple[int, ...], list[int]], num_clients: int, num_tokens: int, pause_s: float = 0.0
    ) -> None:
        self._app = app
        self._answers = answers
        self._num_tokens = num_tokens
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(num_clients)]
        self.problems: list[str] = []
        self.num_answers = 0
        self.started = 0.0

    def __enter__(self) -> "Load":
        self.started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(CALL_TIMEOUT_S)
            if thread.is_alive():
                self.problems.append("a call has not ended")

    def _run(self, number: int) -> None:
        prompts = list(self._answers)
        with grpc.insecure_channel(self._app.grpc) as channel:
            stub = rpc.InferenceStub(channel)
            while not self._stop.is_set():
                prompt = prompts[number % len(prompts)]
                number += 1
                problem = self._ask(stub, prompt)
                with self._lock:
                    self.num_answers += 1
                    if problem is not None:
                        self.problems.append(problem)
                self._stop.wait(self._pause_s)

    def _ask(self, stub: rpc.InferenceStub, prompt: tuple[int, ...]) -> str | None:
        try:
            answer = ask(self._app, stub, prompt, self._num_tokens)
        except grpc.RpcError as error:
            return f"{error.code()}: {error.details()}"
        expected = self._answers[prompt]
        return None if answer == expected else f"{list(prompt)}: {answer}, expected {expected}"
