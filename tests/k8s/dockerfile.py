"""k8s/Dockerfile as values: its instructions, what it sets, and the files that a build would be given.

Only what that file uses: one stage, ENV and LABEL as name=value, RUN in shell form, bind mounts.
"""

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """A RUN: its shell command, where it sees which files of the context, as whom it runs and with what ENV before it."""

    command: str
    mounts: Mapping[str, str]
    user: str
    environment: Mapping[str, str]


@dataclass
class Dockerfile:
    """What is left when all instructions are read; `arguments` are the defaults of ARG."""

    base: str = ""
    user: str = "root"
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def read_dockerfile(text: str, path: str = "/usr/local/bin:/usr/bin:/bin") -> Dockerfile:
    """`path` is the PATH of the base image. ValueError on an instruction that this does not know."""
    found = Dockerfile(environment={"PATH": path})
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, rest = line.split(maxsplit=1)
        match word:
            case "ARG":
                name, _, value = rest.partition("=")
                found.arguments.setdefault(name, value)
            case "FROM":
                found.base = _with_values(rest, found.arguments)
            case "ENV":
                found.environment |= _pairs(rest, {**found.arguments, **found.environment})
            case "LABEL":
                found.labels |= _pairs(rest, {**found.arguments, **found.environment})
            case "USER":
                found.user = rest
            case "EXPOSE":
                found.ports = [int(port) for port in rest.split()]
            case "RUN":
                found.runs.append(_run(rest, found))
            case "CMD" | "WORKDIR":
                pass
            case _:
                raise ValueError(f"an instruction that the tests do not know: {line}")
    return found


def copy_context(target: Path, repository: Path = REPOSITORY) -> Path:
    """The repository's files that .dockerignore lets into a build: it refuses all (`*`), then admits by name, then takes out patterns."""
    lines = [line for line in (repository / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    admitted = [line.removeprefix("!") for line in lines if line.startswith("!")]
    refused = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    assert set(lines) == {"*"} | {f"!{name}" for name in admitted} | {f"**/{name}" for name in refused}, lines
    for name in admitted:
        source, copy = repository / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*refused))
        else:
            shutil.copy2(source, copy)
    return target


def _run(rest: str, found: Dockerfile) -> Run:
    mounts = {}
    while rest.startswith("--mount="):
        option, rest = rest.split(maxsplit=1)
        mount = dict(part.split("=", 1) for part in option.removeprefix("--mount=").split(","))
        assert mount["type"] == "bind", option
        mounts[mount["target"]] = mount["source"]
    return Run(rest, mounts, found.user, dict(found.environment))


def _pairs(rest: str, values: Mapping[str, str]) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in shlex.split(rest))
    return {name: _with_values(value, values) for name, value in pairs}


def _with_values(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)
