"""transformers behind /v1/completions: static batches, each token streamed as its step ends.

    python -m tests.benchmarks.peers.static_batches CHECKPOINT DTYPE PORT

What waits when a batch is done makes the next one, prompts of one length together, so that nothing is padded: the best case for it.
Every answer goes on to its max_tokens.
"""

import asyncio
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

NUM_THREADS, MAX_BATCH = 2, 32
GATHER_S = 0.02  # for clients that ask at the same time to come into one batch
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Waiting:
    """A request; `tell` is given each token, from the thread that computes."""

    prompt: Sequence[int]
    max_tokens: int
    tell: Callable[[int], None]


class Batches:
    """The model and the thread that runs it."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation="grouped_mm").eval()
        self._waiting: queue.Queue[Waiting] = queue.Queue()
        self.ask = self._waiting.put

    def run(self) -> None:
        """For ever."""
        while True:
            waiting = [self._waiting.get()]
            time.sleep(GATHER_S)
            while not self._waiting.empty():
                waiting.append(self._waiting.get())
            for length in sorted({len(each.prompt) for each in waiting}):
                alike = [each for each in waiting if len(each.prompt) == length]
                for start in range(0, len(alike), MAX_BATCH):
                    self._generate(alike[start : start + MAX_BATCH])

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Waiting]) -> None:
        cache = DynamicCache(config=self._model.config)
        token_ids = torch.tensor([list(each.prompt) for each in batch])
        for step in range(max(each.max_tokens for each in batch)):
            logits = self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token_ids = logits[:, -1].argmax(-1, keepdim=True)
            for each, token_id in zip(batch, token_ids[:, 0].tolist(), strict=True):
                if step < each.max_tokens:
                    each.tell(token_id)


class Server:
    """Just enough HTTP for the load generator and the oracle's question."""

    def __init__(self, batches: Batches, tokenizer: Any) -> None:
        self._batches = batches
        self._tokenizer = tokenizer

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                sizes = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = json.loads(await reader.readexactly(int(sizes[0]))) if sizes else {}
                kind = b"text/event-stream" if body.get("stream") else b"application/json"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: " + kind + b"\r\nconnection: close\r\n\r\n")
                await (self._complete(body, writer) if body else self._say(writer, b"{}"))
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[int]()

        def tell(token_id: int) -> None:
            loop.call_soon_threadsafe(told.put_nowait, token_id)

        self._batches.ask(Waiting(body["prompt"], body["max_tokens"], tell))
        token_ids = []
        for _ in range(body["max_tokens"]):
            token_ids.append(await told.get())
            if body.get("stream"):
                choice = {"index": 0, "text": self._tokenizer.decode(token_ids[-1:]), "finish_reason": None}
                await self._say(writer, _event({"choices": [choice]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(token_ids)}
        if body.get("stream"):
            await self._say(writer, _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
            return
        choice = {"index": 0, "text": self._tokenizer.decode(token_ids), "finish_reason": "length", "token_ids": token_ids}
        await self._say(writer, json.dumps({"choices": [choice], "usage": usage}).encode())

    async def _say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def _until_it_fails(run: Callable[[], None]) -> None:
    """A batch that fails ends the process: whoever waits for it sees the connection close and this trace in the log."""
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


async def serve(checkpoint: Path, dtype: torch.dtype, port: int) -> None:
    torch.set_num_threads(NUM_THREADS)
    batches = Batches(checkpoint, dtype)
    threading.Thread(target=_until_it_fails, args=(batches.run,), daemon=True).start()
    server = await asyncio.start_server(Server(batches, AutoTokenizer.from_pretrained(checkpoint)).answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])))
