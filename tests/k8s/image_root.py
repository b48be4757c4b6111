"""A directory that stands for the image's file system: k8s/Dockerfile's own steps run into it, and its user starts what they made.

Where this runs as root, the image's user is a real one: its number, none of root's capabilities, and a mount namespace in which the
repository is empty. Elsewhere it is whoever runs the test.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.k8s.dockerfile import REPOSITORY, Dockerfile, Run, copy_context, read_dockerfile

INSTALL_TIMEOUT_S = 600.0
# How pip is told where packages are: on the machine of a build, not in an image.
_NETWORK = ("HOME", "TORCH_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_PIPS = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.upper() in _NETWORK}
# $1 the repository, $2 a closed directory around the interpreter or nothing, $3 the interpreter's own, $4 user, $5 group; then the command.
_AS_USER = """
set -e
if [ -n "$2" ]; then
    aside=$(mktemp -d)
    mount --bind "$3" "$aside"
    mount -t tmpfs -o mode=755 none "$2"
    mkdir -p "$3"
    mount --bind "$aside" "$3"
fi
if [ -d "$1" ]; then mount -t tmpfs -o mode=755 none "$1"; fi
user=$4 group=$5
shift 5
exec setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs --bounding-set=-all "$@"
"""


@dataclass(frozen=True)
class ImageRoot:
    """Everything of the image is below `root`, where the image has it at /."""

    root: Path

    @property
    def prefix(self) -> Path:
        return self.root / "opt" / "shoal"

    @property
    def packages(self) -> Path:
        (found,) = self.prefix.glob("lib/python*/site-packages")
        return found

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def machine_code(self) -> list[str]:
        """Names of the files that Numba has written."""
        return sorted(str(file.relative_to(self.root)) for file in (self.root / "opt/shoal-machine-code").rglob("*") if file.is_file())

    @property
    def environment(self) -> dict[str, str]:
        """A container's: the image's ENV and nothing of ours."""
        return self._environment(dict(read().environment))

    def build(self) -> "ImageRoot":
        """All the Dockerfile's steps but the operating system's own; the source is gone afterwards."""
        prepared, *steps = read().runs
        assert "apt-get" in prepared.command
        context = copy_context(self.root / "context")
        for name in ("opt/shoal-machine-code", "home/ray", "models", "t"):
            (self.root / name).mkdir(parents=True)
            if os.geteuid() == 0:
                os.chown(self.root / name, *self.user)
        for step in steps:
            self._run(step, context)
        shutil.rmtree(context)
        return self

    @property
    def user(self) -> tuple[int, int]:
        """Number and group."""
        number, group = map(int, read().user.split(":"))
        return (number, group) if os.geteuid() == 0 else (os.geteuid(), os.getegid())

    def command(self, *words: str | Path) -> list[str]:
        """Runs the words as the image's user; to be started with `environment`."""
        if os.geteuid() != 0:
            return [str(word) for word in words]
        interpreter = Path(sys.base_prefix)
        closed = next((str(parent) for parent in reversed(interpreter.parents) if not parent.stat().st_mode & 0o001), "")
        user, group = map(str, self.user)
        return [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", _AS_USER, "sh"),
            *(str(REPOSITORY), closed, str(interpreter), user, group),
            *map(str, words),
        ]

    def call(self, *words: str | Path) -> str:
        """What it prints; a failure shows all of that."""
        return _checked(self.command(*words), self.root, self.environment)

    def _run(self, step: Run, context: Path) -> None:
        source = self.root / "src"
        for target, given in step.mounts.items():
            place = self.root / target.removeprefix("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy(context / given, place)
        words = [self._below(word) for word in step.command.split()]
        environment = self._environment(dict(step.environment))
        if step.user == "root":
            _checked(words, self.root, environment | _PIPS)
        else:
            _checked(self.command(*words), self.root, environment)
        shutil.rmtree(source, ignore_errors=True)

    def _below(self, text: str) -> str:
        return text.replace("/opt/", f"{self.root}/opt/").replace("/src/", f"{self.root}/src/")

    def _environment(self, image: dict[str, str]) -> dict[str, str]:
        below = {name: self._below(value) for name, value in image.items()}
        # Ray's sockets lie below its directory, and their names must stay short.
        return {**below, "HOME": f"{self.root}/home/ray", "USER": "ray", "RAY_TMPDIR": f"{self.root}/t", "COLUMNS": "200"}


def read() -> Dockerfile:
    """The recipe, on a base image whose interpreter is ours."""
    return read_dockerfile((REPOSITORY / "k8s" / "Dockerfile").read_text(), f"{Path(sys.executable).parent}:/usr/bin:/bin")


def require_an_unprivileged_user() -> None:
    """Skips where root cannot become one that does not see the repository."""
    if os.geteuid() == 0 and (
        not shutil.which("setpriv") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
    ):
        pytest.skip("root here may not have a mount namespace (util-linux and CAP_SYS_ADMIN)")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _checked(words: list[str], directory: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        words, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=INSTALL_TIMEOUT_S
    )
    assert done.returncode == 0, f"{words[-3:]}:\n{done.stdout[-4000:]}"
    return done.stdout
