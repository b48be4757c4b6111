"""`shoal serve` from start to end: what it prints, what it answers, and that nothing of it is left behind."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.client import Access, get_json, post_events
from tests.cluster.serve_process import ServeProcess
from tests.cluster_unit.redis_server import write_certificate
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.cluster

GONE_TIMEOUT_S = 15.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny("v2-lite", tmp_path_factory.mktemp("tiny"))


def named_files() -> set[str]:
    """Files and segments that could be ours, outside Ray's own session directory."""
    folders = Path("/dev/shm"), Path(tempfile.gettempdir())
    return {str(file) for folder in folders for file in folder.iterdir() if "shoal" in file.name.lower()}


def sockets_of(pids: Iterable[int]) -> set[str]:
    """Inodes of the sockets that these processes hold."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    return inodes


def unix_sockets() -> set[str]:
    """Inodes of every Unix socket of the machine."""
    return {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}


def assert_stops_and_leaves_nothing(serve: ServeProcess, number: int, before: set[str]) -> None:
    held = sockets_of(serve.descendants()) & unix_sockets()
    assert held, "while it runs its processes hold sockets"
    assert serve.stop(number) == 0
    until = time.monotonic() + GONE_TIMEOUT_S
    while (left := (serve.descendants(), held & unix_sockets(), named_files() - before)) != ({}, set(), set()):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def complete(serve: ServeProcess, access: Access | None = None) -> str:
    body = {"model": serve.name, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "stream": True, "ignore_eos": True}
    events = post_events(f"{serve.http}/v1/completions", body, access)
    return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.mark.parametrize(("number", "scheme"), [(signal.SIGINT, "http"), (signal.SIGTERM, "https")])
def test_serves_answers_and_leaves_nothing(tiny, number, scheme, tmp_path):
    before = named_files()
    access, flags = None, ()
    if scheme == "https":
        write_certificate(tmp_path)
        access = Access(ca_file=str(tmp_path / "cert.pem"))
        flags = ("--certificate", str(tmp_path / "cert.pem"), "--certificate-key", str(tmp_path / "key.pem"))
    with ServeProcess(tiny, *flags) as serve:
        serve.wait_for("^Ctrl-C stops it", 60)
        assert [line for line in serve.lines if line.startswith("HTTP  The capital of France is")]
        assert [line for line in serve.lines if line.startswith("gRPC  The capital of France is")]
        assert serve.http.startswith(f"{scheme}://")
        assert complete(serve, access) == complete(serve, access)
        assert_stops_and_leaves_nothing(serve, number, before)


@pytest.mark.parametrize("role", ["Gateway", "Router", "ExpertHost", "Coordinator"])
def test_leaves_nothing_after_an_actor_was_killed(tiny, role):
    before = named_files()
    with ServeProcess(tiny) as serve:
        victims = [pid for pid, command in serve.descendants().items() if f":{role}" in command]
        assert victims, serve.descendants()
        os.kill(victims[0], signal.SIGKILL)
        assert_stops_and_leaves_nothing(serve, signal.SIGINT, before)


def test_two_applications_do_not_meet(tiny):
    with ServeProcess(tiny, "--name", "one") as one, ServeProcess(tiny, "--name", "two", "--expert-hosts", "1") as two:
        assert complete(one) == complete(two)
        for serve, num_hosts in ((one, 2), (two, 1)):
            assert [model["id"] for model in get_json(f"{serve.http}/v1/models")["data"]] == [serve.name]
            assert len(get_json(f"{serve.http}/cluster/hosts")) == num_hosts


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
        (["--device", "cuda"], "the layout needs 3 GPUs, but Ray has 0"),
        (["--routers", "5000"], "CPUs, but Ray has"),
        (["--max-model-len", "100000000"], "model.max_model_len is 100000000"),
        (["--dtype", "int3"], "model.dtype"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_sentence(tiny, flags, sentence):
    serve = ServeProcess(tiny, *flags)
    assert serve.process.wait(60) == 1
    serve._reader.join(5)
    problems = [line for line in serve.lines if line.startswith("shoal: ")]
    assert len(problems) == 1, serve.lines
    assert sentence in problems[0]


def test_a_port_that_is_taken_is_named(tiny):
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        serve = ServeProcess(tiny, "--http-port", port)
        assert serve.process.wait(60) == 1
        serve._reader.join(5)
        assert f"port {port} on 127.0.0.1 is taken" in "\n".join(serve.lines)


def test_a_damaged_checkpoint_is_named_before_anything_starts(tiny, tmp_path):
    import shutil

    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    serve = ServeProcess(damaged)
    assert serve.process.wait(60) == 1
    serve._reader.join(5)
    assert "model.safetensors" in "\n".join(line for line in serve.lines if line.startswith("shoal: "))
