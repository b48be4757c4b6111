"""The microservice of k8s/example against a guarded Shoal: as its image has it, only what it imports comes from this environment."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.guard.keys import new_key
from cluster.guard.keys_file import add_key
from tests.cluster.conftest import App, Shoals
from tests.cluster.fragile_door import FragileDoor
from tests.free_ports import free_port
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.cluster

NAME = "titled"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "k8s" / "example"
TEXT = {"text": "She sold her bicycle and bought a boat."}  # an answer of all 32 tokens
MIDDLE_OF_AN_ANSWER = 400  # bytes: past the greetings of HTTP/2, before the last token and the status


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, str, str]:
    """The file of the gateways, and two keys of theirs."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = []
    for name in ("titles", "titles-next"):
        key, entry = new_key(name, ("inference",))
        add_key(file, entry)
        made.append(key)
    return file, made[0], made[1]


@pytest.fixture(scope="module")
def app(shoals: Shoals, keys, tmp_path_factory) -> Iterator[App]:
    directory = write_tiny("v2-lite", tmp_path_factory.mktemp("v2-lite"))
    with shoals.running(directory, NAME, security__keys_file=str(keys[0])) as running:
        yield running


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """What the Dockerfile makes of the .proto file, and nothing else of Shoal's."""
    directory = tmp_path_factory.mktemp("generated")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "cluster/api/proto"), f"--python_out={directory}"]
    subprocess.run([*command, f"--grpc_python_out={directory}", "shoal/v1/inference.proto"], check=True, timeout=60)
    return directory


@contextmanager
def service(generated: Path, address: str, key_file: Path, deadline_s: float) -> Iterator[str]:
    """The service as its container runs it; yields its URL."""
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(generated),
        "SHOAL_ADDRESS": address,
        "SHOAL_API_KEY_FILE": str(key_file),
        "SHOAL_APPLICATION": NAME,
        "DEADLINE_S": str(deadline_s),
        "PORT": str(port),
    }
    process = subprocess.Popen([sys.executable, EXAMPLE / "service.py"], env=environment, cwd=generated)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while not answers(f"{url}/healthz"):
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < until, "the service did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def door(app: App) -> Iterator[FragileDoor]:
    with FragileDoor(app.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def key_file(keys, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "key"
    file.write_text(keys[1] + "\n")
    return file


@pytest.fixture(scope="module")
def titles(generated, door, key_file) -> Iterator[str]:
    with service(generated, door.address, key_file, 60.0) as url:
        yield f"{url}/titles"


def test_a_title(app: App, titles, keys):
    answer = httpx.post(titles, json=TEXT, timeout=60)
    assert answer.status_code == 200, answer.text
    messages = [{"role": "system", "content": instruction()}, {"role": "user", "content": TEXT["text"]}]
    body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 32}
    direct = httpx.post(f"{app.http}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {keys[1]}"}, timeout=60).json()
    assert answer.json()["title"] == direct["choices"][0]["message"]["content"].strip()
    assert answer.json()["tokens"] == direct["usage"]["completion_tokens"] == 32
    assert answer.json()["attempts"] == 1


def instruction() -> str:
    """The service's own words, read from its file: importing it would register a second shoal.v1."""
    line = next(line for line in (EXAMPLE / "service.py").read_text().splitlines() if line.startswith("INSTRUCTION"))
    return line.split('"')[1]


def test_an_answer_that_breaks_off_is_asked_for_again(titles, door: FragileDoor):
    whole = httpx.post(titles, json=TEXT, timeout=60).json()
    door.cut_once(MIDDLE_OF_AN_ANSWER)
    broken = httpx.post(titles, json=TEXT, timeout=60)
    assert broken.status_code == 200, broken.text
    assert door.num_cut == 1
    assert broken.json()["attempts"] >= 2
    assert broken.json()["title"] == whole["title"]


def test_a_key_that_is_replaced_is_read_without_a_restart_and_a_wrong_one_is_not_tried_again(titles, keys, key_file):
    try:
        key_file.write_text("shoal-guess\n")
        refused = httpx.post(titles, json=TEXT, timeout=60)
        assert refused.status_code == 500
        assert "key" in refused.json()["error"]
        key_file.write_text(keys[2])
        assert httpx.post(titles, json=TEXT, timeout=60).status_code == 200
    finally:
        key_file.write_text(keys[1])


def test_the_deadline_ends_what_gets_no_answer(generated, door: FragileDoor, key_file):
    with FragileDoor(door.address) as shut, service(generated, shut.address, key_file, 1.0) as url:
        shut.is_shut = True
        late = httpx.post(f"{url}/titles", json=TEXT, timeout=60)
    assert late.status_code == 504
    with service(generated, f"127.0.0.1:{free_port()}", key_file, 1.0) as url:
        nobody = httpx.post(f"{url}/titles", json=TEXT, timeout=60)
    assert nobody.status_code == 503
