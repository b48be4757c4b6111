"""What KubeRay and a platform team ask of the image, as far as its recipe tells."""

import re
import subprocess
import tomllib

import pytest

from tests.k8s.dockerfile import REPOSITORY, Dockerfile, copy_context, read_dockerfile

INSTALL = REPOSITORY / "k8s" / "install.sh"


@pytest.fixture(scope="module")
def image() -> Dockerfile:
    return read_dockerfile((REPOSITORY / "k8s" / "Dockerfile").read_text())


def pinned(name: str) -> str:
    return re.search(rf"(?m)^{name}==(\S+)$", (REPOSITORY / "constraints.txt").read_text())[1]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_user_is_not_root_and_a_number(image):
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.user), "the kubelet checks runAsNonRoot against a number only"


def test_the_base_is_pinned_to_a_patch_version_of_the_tested_python(image):
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", image.base)[1]
    assert project()["requires-python"] == f">={version}"


def test_the_version_label_has_the_ray_version_and_the_build(image):
    assert image.labels["org.opencontainers.image.version"] == f"{project()['version']}-ray{pinned('ray')}-cpu"
    assert image.labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_ray_command_is_found_by_plain_and_by_login_shells(image):
    assert image.environment["PATH"].startswith("/opt/shoal/bin:")
    assert any("'PATH=/opt/shoal/bin:$PATH' >/etc/profile.d/" in run.command for run in image.runs)


def test_debian_packages_are_what_probes_need_and_no_compiler(image):
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends ([^&]+)", image.runs[0].command)
    assert packages.split() == ["ca-certificates", "wget"]


def test_what_is_installed_is_installed_by_the_script_as_root(image):
    by_script = [run for run in image.runs if "install.sh" in run.command]
    assert [run.command.split() for run in by_script] == [["/src/k8s/install.sh", "/opt/shoal", part] for part in ("dependencies", "shoal")]
    assert {run.user for run in by_script} == {"root"}
    assert not [run for run in image.runs if "pip" in run.command]


def test_a_change_of_the_code_leaves_the_layer_of_dependencies_alone(image):
    seen = [set(run.mounts.values()) for run in image.runs if "install.sh" in run.command]
    assert seen == [{"pyproject.toml", "constraints.txt", "k8s/install.sh"}, {"."}]


def test_machine_code_is_made_by_the_user_who_runs_it(image):
    (run,) = [run for run in image.runs if "cluster.precompile" in run.command]
    assert run.user == image.user
    assert run.environment["NUMBA_CACHE_DIR"] == image.environment["NUMBA_CACHE_DIR"]


def test_the_ports_are_the_manifests(image):
    assert sorted(image.ports) == [6379, 8000, 8080, 8265, 9000, 10001]


def test_the_context_has_the_product_and_nothing_else(tmp_path):
    given = {str(file.relative_to(tmp_path)) for file in copy_context(tmp_path).rglob("*") if file.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    product = {name for name in tracked if name.split("/")[0] in {"model", "router", "actors", "cluster"}}
    others = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "k8s/install.sh", "k8s/model_init.py"}
    assert others <= given
    assert product <= given
    assert not {name for name in given - others if name.split("/")[0] not in {"model", "router", "actors", "cluster"}}


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"), [([], 1, "which prefix?"), (["/nowhere", "all-of-it"], 2, "no part is called all-of-it")]
)
def test_the_script_says_what_it_wants(arguments, status, sentence):
    done = subprocess.run([INSTALL, *arguments], capture_output=True, text=True)
    assert done.returncode == status
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("asked", "tag", "index"),
    [
        ([], "cpu", "https://download.pytorch.org/whl/cpu"),
        (["ACCELERATOR=gpu"], "gpu", ""),
        (["ACCELERATOR=gpu", "TORCH_INDEX_URL=https://pypi.example/cu126"], "gpu", "https://pypi.example/cu126"),
        (["EXTRAS=demo"], "cpu-demo", "https://download.pytorch.org/whl/cpu"),
    ],
)
def test_make_image_tags_with_the_ray_version(asked, tag, index):
    told = subprocess.run(["make", "--dry-run", "image", *asked], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert f"-t shoal:{project()['version']}-ray{pinned('ray')}-{tag} " in told
    assert f"--build-arg TORCH_INDEX_URL={index} " in told
