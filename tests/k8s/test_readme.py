"""What k8s/README.md tells people to type, and the numbers that it gives, are those of the files beside it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from google.protobuf import json_format

from cluster.api.proto.shoal.v1 import inference_pb2
from cluster.cli import app as command_line
from tests.k8s.settings import is_setting, named_settings

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
README = (K8S / "README.md").read_text()
RAY_SERVICE = yaml.safe_load((K8S / "base" / "rayservice.yaml").read_text())["spec"]
GROUPS = RAY_SERVICE["rayClusterConfig"]["workerGroupSpecs"]


def typed() -> list[str]:
    """The lines that are for a shell, comments cut off, those that go on joined."""
    lines = [line.strip() for line in re.sub(r"\\\n\s+", " ", README).splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*| {2,}#.*", "", line) for line in lines]


def test_every_path_exists():
    named = set(re.findall(r"(?<![\w/.])k8s/[\w./-]*[\w/]", README)) | {
        f"k8s/{path}" for path in re.findall(r"`((?:overlays|base|components|monitoring|example)/[\w./-]*)`", README)
    }
    assert len(named) > 10
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_commands_of_shoal_and_their_flags_exist():
    lines = [line.split("in_shoal ")[-1] for line in typed() if re.match(r"(in_shoal )?shoal ", line)]
    assert len(lines) >= 4
    for line in lines:
        _, *words = shlex.split(line)
        command = typer.main.get_command(command_line)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {flag for parameter in command.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_image_is_called_what_make_calls_it():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    ray = re.search(r"^ray==(.*)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    tags = set(re.findall(r"shoal:([\w.-]+)", README)) - {"9000"}
    assert tags == {f"{version}-ray{ray}-{kind}" for kind in ("cpu", "gpu", "cpu-demo")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"image", "manifests"} <= set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_the_first_request_is_one():
    (line,) = [line for line in typed() if "grpcurl" in line]
    words = shlex.split(line)
    request = json_format.ParseDict(json.loads(words[words.index("-d") + 1]), inference_pb2.GenerateRequest())
    assert request.sampling.max_tokens > 0
    service, method = words[-1].split("/")
    assert method in inference_pb2.DESCRIPTOR.services_by_name[service.split(".")[-1]].methods_by_name
    name, port = words[-2].split(":")
    door = yaml.safe_load((K8S / "base" / "service.yaml").read_text())
    assert door["metadata"]["name"] == name
    assert int(port) in {one["port"] for one in door["spec"]["ports"]}
    assert "shoal-client=true" in words


def test_the_secrets_are_those_that_the_manifests_name():
    table = set(re.findall(r"^\| `(shoal-[\w-]+)` \|", README, re.MULTILINE))
    assert table == set(re.findall(r"^secret (shoal-[\w-]+)", (K8S / "secrets.sh").read_text(), re.MULTILINE))
    manifests = "\n".join(file.read_text() for file in (K8S / "base").glob("*.yaml"))
    assert [name for name in table if name not in manifests] == []
    example = (K8S / "example" / "deployment.yaml").read_text()
    made, key = re.search(r"create secret generic (titles-[\w-]+) --from-literal (\w+)=", README).groups()
    assert f"secretName: {made}" in example
    assert f"/{key}\n" in example


def test_settings_that_it_names_exist():
    named = named_settings(README)
    assert len(named) > 5
    assert [path for path in named if not is_setting(path)] == []


def test_its_pods_and_labels_are_ours():
    pod = yaml.safe_load(re.search(r"<<'POD'\n(.*?)\n    POD", README, re.DOTALL)[1])
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == yaml.safe_load((K8S / "base" / "models.yaml").read_text())["metadata"]["name"]
    components = {group["template"]["metadata"]["labels"]["app.kubernetes.io/component"] for group in GROUPS}
    assert set(re.findall(r"component=(\w+)", README)) <= components


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group["groupName"])
def test_its_times_are_those_of_the_pods(group):
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][:2] == ["shoal", "leave-node"]
    assert f"the pod has {pod['terminationGracePeriodSeconds']} s" in README


def test_its_times_are_those_of_the_settings():
    production = yaml.safe_load((K8S / "overlays" / "production" / "shoal.yaml").read_text())
    waits = production["router"]["drain_timeout_s"], production["gateway"]["drain_timeout_s"]
    assert f"`drain_timeout_s` ({waits[0]} s and {waits[1]} s)" in README
    assert f"`placement.drain_timeout_s` ({production['placement']['drain_timeout_s']} s)" in README
    assert f"`rayClusterDeletionDelaySeconds` ({RAY_SERVICE['rayClusterDeletionDelaySeconds']})" in README
