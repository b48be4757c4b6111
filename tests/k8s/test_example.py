"""The example as files: what it needs is what it names, and what it names exists."""

import ast
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "k8s" / "example"
DISTRIBUTION_OF = {"grpc": "grpcio", "google": "protobuf"}
OWN = {"shoal", "shoal_client"}
FOR_GENERATED_CODE = {"grpcio-tools", "protobuf"}


def pins(file: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def imported() -> set[str]:
    """Top-level names, less the standard library's and its own."""
    names = set()
    for file in EXAMPLE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - OWN


def test_requirements_are_what_is_imported_in_the_versions_that_are_tested():
    required = pins(EXAMPLE / "requirements.txt")
    assert set(required) == {DISTRIBUTION_OF.get(name, name) for name in imported()} | FOR_GENERATED_CODE
    tested = pins(ROOT / "constraints.txt")
    assert {name: tested.get(name) for name in required} == required


def test_nothing_of_shoal_is_imported():
    assert imported() & {"model", "router", "actors", "cluster", "ray", "torch"} == set()


def test_the_image_is_built_from_files_that_exist_and_does_not_run_as_root():
    lines = (EXAMPLE / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {Path(source).name for source in copied} >= {file.name for file in EXAMPLE.glob("*.py")}
    assert any(re.fullmatch(r"USER [1-9]\d*", line) for line in lines)


def test_the_deployment_gives_what_the_service_reads():
    pod = yaml.safe_load((EXAMPLE / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    read = set(re.findall(r'environ(?:ment)?(?:\.get\(|\[)"(\w+)"', (EXAMPLE / "service.py").read_text()))
    assert set(given) <= read
    (mount,) = container["volumeMounts"]
    assert given["SHOAL_API_KEY_FILE"].startswith(mount["mountPath"] + "/")
    assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
