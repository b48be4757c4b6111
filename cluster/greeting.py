"""What `shoal serve` does once it is ready: asks one question over HTTP and one over gRPC, and says what to try next."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc
from rich.console import Console
from rich.text import Text

from cluster.api.proto.shoal.v1 import inference_pb2, inference_pb2_grpc
from cluster.client import KEY_VARIABLE, Access, post_events
from cluster.guard.setup import OwnKeys

QUESTION = "The capital of France is"
MAX_TOKENS = 24
TIMEOUT_S = 60.0
POLL_S = 0.05

logger = logging.getLogger(__name__)


class Stop(Protocol):
    """Whether the user wants to leave."""

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        ...


@dataclass(frozen=True)
class Address:
    """Where an application is spoken to, with the keys that its doors ask for. `certificate` is HTTPS's own, a PEM file."""

    model: str
    http: str
    grpc: str
    keys: OwnKeys = field(default_factory=OwnKeys)
    certificate: str | None = None


def greet(console: Console, address: Address, stop: Stop) -> None:
    """Asks over both doors at once and prints the answers beside the question. Returns at once on `stop`.

    Never raises: serving goes on whatever a model answers.
    """
    try:
        _ask_both(console, {"HTTP": lambda: _ask_http(address), "gRPC": lambda: _ask_grpc(address)}, stop)
        if not stop.requested:
            console.print(_next_steps(address), highlight=False, soft_wrap=True, markup=False)
    except Exception:
        logger.exception("the greeting failed; serving goes on")


def _ask_both(console: Console, doors: dict[str, Callable[[], str]], stop: Stop) -> None:
    """Daemon threads, because nobody waits for an answer after the user has left."""
    answers: queue.Queue[tuple[str, str | Exception]] = queue.Queue()

    def ask(door: str, question: Callable[[], str]) -> None:
        try:
            answers.put((door, question()))
        except Exception as error:  # printed by the thread that reads the queue
            answers.put((door, error))

    for door, question in doors.items():
        threading.Thread(target=ask, args=(door, question), daemon=True, name=f"greeting-{door}").start()
    waiting, until = set(doors), time.monotonic() + TIMEOUT_S
    while waiting and not stop.requested and time.monotonic() < until:
        try:
            door, answer = answers.get(timeout=POLL_S)
        except queue.Empty:
            continue
        waiting.remove(door)
        console.print(_line(door, answer), highlight=False, soft_wrap=True)
    if not stop.requested:
        for door in sorted(waiting):
            console.print(_line(door, TimeoutError(f"none within {TIMEOUT_S:.0f} s")), highlight=False, soft_wrap=True)


def _line(door: str, answer: str | Exception) -> Text:
    """As Text, because brackets in an answer are no markup; on one line and without what would steer the terminal."""
    if isinstance(answer, Exception):
        return Text(f"{door}  no answer: {answer}")
    text = "".join(character if character.isprintable() else " " for character in answer)
    return Text.assemble(f"{door}  ", (QUESTION, "bold"), " ", " ".join(text.split()))


def _ask_http(address: Address) -> str:
    body = {"model": address.model, "prompt": QUESTION, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    events = post_events(f"{address.http}/v1/completions", body, Access(address.keys.http, address.certificate, is_own=True))
    return "".join(choice["text"] for event in events for choice in event["choices"])


def _ask_grpc(address: Address) -> str:
    sampling = inference_pb2.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    request = inference_pb2.GenerateRequest(model=address.model, text=QUESTION, sampling=sampling)
    metadata = [("application", address.model)]
    if address.keys.grpc is not None:
        metadata.append(("authorization", f"Bearer {address.keys.grpc}"))
    with grpc.insecure_channel(address.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return "".join(answer.text for answer in stub.Generate(request, timeout=TIMEOUT_S, metadata=metadata))


def _next_steps(address: Address) -> str:
    """Commands that run as they stand; where clients have keys of their own they take theirs from SHOAL_API_KEY."""
    model, http, keys = address.model, address.http, address.keys
    curl_key = "" if keys.http is None else f' -H "authorization: Bearer ${KEY_VARIABLE}"'
    python_key = '"-"' if keys.http is None else f'__import__("os").environ["{KEY_VARIABLE}"]'
    grpc_key = "" if keys.grpc is None else f' -H "authorization: Bearer {keys.grpc if keys.is_for_clients else "$" + KEY_VARIABLE}"'
    return f"""
try next, in another terminal:
  curl {http}/v1/completions -H 'content-type: application/json'{curl_key} \\
    -d '{{"model": "{model}", "prompt": "{QUESTION}", "max_tokens": 24, "temperature": 0}}'
  python -c 'import openai; print(openai.OpenAI(base_url="{http}/v1", api_key={python_key}).chat.completions.create(model="{model}",
    messages=[{{"role": "user", "content": "Name three rivers."}}]).choices[0].message.content)'
  grpcurl -plaintext -import-path cluster/api/proto -proto shoal/v1/inference.proto -H 'application: {model}'{grpc_key} \\
    -d '{{"model": "{model}", "text": "{QUESTION}"}}' {address.grpc} shoal.v1.Inference/Generate
  shoal status --url {http}
Ctrl-C stops it.
"""
