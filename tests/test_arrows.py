"""The one arrow: model <- router <- actors <- cluster, and Ray only in the two on the right."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["model", "router", "actors", "cluster"]


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    tops = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            tops.add((node.module or "").split(".")[0])
    return tops


@pytest.mark.parametrize("package", ORDER)
def test_imports_only_point_left(package):
    forbidden = set(ORDER[ORDER.index(package) + 1 :]) | ({"ray"} if package in ("model", "router") else set()) | {"tests"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): imported(file.read_text()) & forbidden for file in files}
    assert {file: tops for file, tops in wrong.items() if tops} == {}


def test_nothing_else_lies_at_the_top():
    allowed = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "k8s", "tests", *ORDER}
    made_by_commands = {"demo", "build", "shoal.egg-info"}
    there = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert there - made_by_commands <= allowed
