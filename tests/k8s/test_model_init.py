"""The init step of a model volume: copies what is not there, checks what is, and never shows half a checkpoint."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.k8s.dockerfile import REPOSITORY
from tests.tiny_models import write_tiny


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("model_init", REPOSITORY / "k8s" / "model_init.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint of several shards, with what a hub's repository has beside them."""
    directory = write_tiny("mixtral", tmp_path_factory.mktemp("whole") / "tiny", max_shard_size=200_000)
    (directory / "consolidated.00.pth").write_bytes(b"x" * 100)
    (directory / ".cache").mkdir()
    return directory


@pytest.fixture
def store(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "store" / "tiny")
    return tmp_path / "store"


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_copies_what_serving_reads_and_finds_it_whole_the_next_time(script, store, tmp_path, capsys):
    models = tmp_path / "models"
    assert script.main(["--from", str(store), "--to", str(models), "tiny"]) == 0
    assert len(shards(models / "tiny")) == len(shards(store / "tiny")) > 1
    assert {file.name for file in (models / "tiny").iterdir()} == {
        file.name for file in (store / "tiny").iterdir() if file.suffix in (".json", ".safetensors", ".jinja")
    }
    assert {file.stat().st_mode & 0o777 for file in (models / "tiny").iterdir()} == {0o644}
    assert "copying" in capsys.readouterr().out
    assert script.main(["--from", str(store), "--to", str(models), "tiny"]) == 0
    assert "copying" not in capsys.readouterr().out


def test_several_checkpoints_are_provided_in_one_step(script, store, tmp_path):
    shutil.copytree(store / "tiny", store / "other")
    models = tmp_path / "models"
    assert script.main(["--from", str(store), "--to", str(models), "tiny", "other"]) == 0
    assert [path.name for path in sorted(models.iterdir()) if not path.name.startswith(".")] == ["other", "tiny"]


def test_a_volume_that_has_it_already_may_be_read_only(script, store, capsys):
    before = sorted(store.rglob("*"))
    assert script.main(["--to", str(store), "tiny"]) == 0
    assert "is whole" in capsys.readouterr().out
    assert sorted(store.rglob("*")) == before, "a check writes nothing"


def test_a_shard_cut_short_on_the_volume_is_named(script, store, capsys):
    cut(shards(store / "tiny")[1])
    assert script.main(["--to", str(store), "tiny"]) == 1
    assert shards(store / "tiny")[1].name in capsys.readouterr().err


def test_a_damaged_copy_is_replaced_from_the_store(script, store, tmp_path):
    models = tmp_path / "models"
    script.main(["--from", str(store), "--to", str(models), "tiny"])
    cut(shards(models / "tiny")[0])
    assert script.main(["--from", str(store), "--to", str(models), "tiny"]) == 0
    script.check_checkpoint(models / "tiny")


def test_a_damaged_store_never_reaches_the_place(script, store, tmp_path, capsys):
    models = tmp_path / "models"
    cut(shards(store / "tiny")[0])
    assert script.main(["--from", str(store), "--to", str(models), "tiny"]) == 1
    assert shards(store / "tiny")[0].name in capsys.readouterr().err
    assert not (models / "tiny").exists()


def test_an_interrupted_copy_goes_on_where_it_was(script, store, tmp_path, capsys):
    partial = tmp_path / "models" / ".tiny.partial"
    partial.mkdir(parents=True)
    for file in shards(store / "tiny")[:-1]:
        shutil.copy(file, partial)
    (partial / "of-an-older-version.safetensors").write_bytes(b"old")
    assert script.main(["--from", str(store), "--to", str(tmp_path / "models"), "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if ".safetensors " in line]) == 1
    assert not (tmp_path / "models" / "tiny" / "of-an-older-version.safetensors").exists()


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(script, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert script.main(["--from", str(store), "--to", str(tmp_path / "models"), "tiny"]) == 1
    assert "GB free, and tiny takes" in capsys.readouterr().err
    assert not shards(tmp_path / "models" / ".tiny.partial")


@pytest.mark.parametrize(
    ("name", "sentence"), [("absent", "no checkpoint to copy"), ("../tiny", "is no name of a directory"), (".tiny", "no name")]
)
def test_what_cannot_be_had_is_said_in_one_sentence(script, store, tmp_path, capsys, name, sentence):
    assert script.main(["--from", str(store), "--to", str(tmp_path / "models"), name]) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.splitlines()) == 1


def test_it_waits_for_what_is_not_there_and_says_each_reason_once(script, store, tmp_path, capsys):
    models = tmp_path / "models"
    rests = []

    def rest(seconds):
        rests.append(seconds)
        if len(rests) == 3:
            shutil.copytree(store / "tiny", models / "tiny")
            cut(shards(models / "tiny")[1])
        elif len(rests) == 6:
            shutil.copy(shards(store / "tiny")[1], models / "tiny")

    assert script.main(["--wait", "--to", str(models), "tiny"], rest) == 0
    assert rests == [script.RETRY_S] * 6
    told = capsys.readouterr()
    absent, damaged = told.err.splitlines()
    assert str(models / "tiny") in absent
    assert shards(store / "tiny")[1].name in damaged
    assert "is whole" in told.out


def test_sigterm_ends_the_waiting_at_once(store):
    """By a handler (143, not -15): without one a container's first process would not notice."""
    command = [sys.executable, REPOSITORY / "k8s" / "model_init.py", "--wait", "--to", store, "absent"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        try:
            assert "absent" in process.stderr.readline()
            process.terminate()
            assert process.wait(30) == 143
        finally:
            process.kill()


def test_pods_of_one_node_wait_for_each_other(script, store, tmp_path, capsys):
    models = tmp_path / "models"
    models.mkdir()
    with (models / ".tiny.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = threading.Thread(target=script.main, args=(["--from", str(store), "--to", str(models), "tiny"],))
        second.start()
        shutil.copytree(store / "tiny", models / "tiny", ignore=shutil.ignore_patterns("*.pth", ".cache"))
    second.join(30)
    assert not second.is_alive()
    assert "copying" not in capsys.readouterr().out, "the first had copied it"
