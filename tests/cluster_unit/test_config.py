import re
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import PlacementSettings, ShoalConfig, read_config
from cluster.errors import ConfigError
from cluster.placement import PlannerSettings

FLAGS = {"model.path": "/models/tiny"}


@pytest.fixture
def written(tmp_path):
    def write(text):
        file = tmp_path / "shoal.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def test_flags_over_file_over_defaults(written):
    file = written("name: named\nrouter: {replicas: 3, page_size: 8}\nexpert_host: {replicas: 4}\n")
    config = read_config(file, FLAGS | {"router.replicas": 5, "expert_host.replicas": None})
    assert config.name == "named"
    assert (config.router.replicas, config.router.page_size, config.router.max_running) == (5, 8, 128)
    assert config.expert_host.replicas == 4
    assert config.gateway.replicas == 1
    assert read_config(file, FLAGS | {"name": "flagged"}).name == "flagged"


def test_the_name_is_the_directorys(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = read_config(None, {"model.path": "demo/"})
    assert config.name == "demo"
    assert Path(config.model.path) == tmp_path / "demo"


@pytest.mark.parametrize("text", ["", "router:\n", "router:\nname:\n", "# nothing\n"])
def test_an_empty_branch_is_no_branch(written, text):
    config = read_config(written(text), FLAGS | {"router.replicas": 2})
    assert (config.router.replicas, config.name) == (2, "tiny")
    assert read_config(written(text), FLAGS).router.replicas == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rooter: {replicas: 2}", "rooter"),
        ("router: {replica: 2}", r"router\.replica:"),
        ("router: {replicas: 0}", r"router\.replicas: .*greater than or equal to 1"),
        ("router: {step_timeout_s: .inf}", r"router\.step_timeout_s"),
        ("security: {secret: short}", r"security\.secret"),
        ("model: foo", "model is 'foo', but must be a mapping"),
        ("router: [1]", r"router is \[1\], but must be a mapping"),
        ("placement: 3", "placement:"),
        ("- router", "must be a mapping of branches"),
        ("router: {", "cannot read the configuration"),
        (b"name: \xff\xfe", "cannot read the configuration"),
        ("name: 'with a space'", "name:"),
        ("1: 2", "1"),
    ],
)
def test_what_is_wrong_is_named(written, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_config(written(text), FLAGS | {"router.gpus": 0.5})


@pytest.mark.parametrize("path", [5, None, ["a"]])
def test_a_path_that_is_no_path(written, path):
    with pytest.raises(ConfigError, match=r"model\.path|model: "):
        read_config(written(f"name: a\nmodel: {{path: {path!r}}}".replace("None", "null")), {})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.yaml'}")):
        read_config(tmp_path / "none.yaml", FLAGS)


def test_the_tree_is_frozen_and_the_secret_is_not_shown():
    config = read_config(None, FLAGS | {"security.secret": "0123456789abcdef"})
    assert "0123456789abcdef" not in repr(config)
    with pytest.raises(ValidationError):
        config.name = "other"
    assert ShoalConfig.model_validate(config.model_dump()) == config


def test_the_planner_is_configured_by_the_placement_branch():
    assert {name: getattr(PlacementSettings(), name) for name in asdict(PlannerSettings())} == asdict(PlannerSettings())


def test_the_stores_url_is_not_shown():
    config = read_config(None, FLAGS | {"state_store.redis_url": "rediss://:correct-horse@127.0.0.1:6380/0"})
    assert "horse" not in repr(config)
    with pytest.raises(ConfigError, match=r"state_store\.redis_url"):
        read_config(None, FLAGS | {"state_store.redis_url": "http://127.0.0.1"})


def test_the_readmes_configurations_are_ones(written):
    examples = re.findall(r"```yaml\n(.*?)```", (Path(__file__).resolve().parents[2] / "README.md").read_text(), re.DOTALL)
    config = read_config(written("\n".join(examples)), FLAGS)
    assert config.dashboard.price_per_host_hour == 2.4
    assert config.placement.min_replicas == 2
    assert config.autoscaling.expert_host is not None
    assert config.autoscaling.expert_host.max_replicas == 8
    assert config.state_store.redis_url is not None
