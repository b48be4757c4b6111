"""A greedy completion that streams over HTTP from a thread, by token ids."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import httpx

from tests.cluster.conftest import App

STREAM_TIMEOUT_S = 240.0


class HttpStream:
    """Starts at once. `finish` answers with all tokens; whatever broke it off is raised there."""

    def __init__(self, app: App, prompt: Sequence[int], num_tokens: int) -> None:
        self.tokens: list[int] = []
        self._begun = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        body = {"model": app.name, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0.0, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        self._future: Future[None] = self._pool.submit(self._run, f"{app.http}/v1/completions", body)

    def wait_until_begun(self, timeout_s: float = 60.0) -> None:
        """Until the first token is there."""
        assert self._begun.wait(timeout_s), "no token has come"

    def finish(self) -> list[int]:
        """Its end."""
        try:
            self._future.result(STREAM_TIMEOUT_S)
        finally:
            self._pool.shutdown()
        return self.tokens

    def _run(self, url: str, body: dict) -> None:
        with httpx.stream("POST", url, json=body, timeout=STREAM_TIMEOUT_S) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    self.tokens += choice["token_ids"] or []
                if self.tokens:
                    self._begun.set()
