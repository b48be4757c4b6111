import re
import socket

import pytest
import yaml
from typer.testing import CliRunner

from cluster import cli, serving
from cluster.config import ShoalConfig, read_config
from cluster.doors import GRPC_SERVICES, Doors
from cluster.errors import StartError
from cluster.guard.keys import KeyRing, parse_keys
from tests.tiny_models import write_tiny

COMMANDS = ["serve", "status", "drain", "rebalance", "scale", "generate", "bench", "demo-model", "config"]
SERVE_FLAGS = {
    "--name": "the directory's name",
    "--http-port": "8000",
    "--grpc-port": "9000",
    "--host": "127.0.0.1",
    "--routers": "1",
    "--expert-hosts": "2",
    "--dtype": "auto",
    "--device": "auto",
    "--gpus-per-router": "1",
    "--gpus-per-host": "1",
    "--max-model-len": "the checkpoint's",
    "--address": "a Ray of its own",
    "--config": None,
    "--keys": None,
    "--insecure": None,
    "--certificate": None,
    "--certificate-key": None,
}


@pytest.fixture
def shown(monkeypatch):
    def run(*arguments):
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERMINAL_WIDTH": "200", "NO_COLOR": "1"})
        return result.exit_code, result.output

    return run


@pytest.fixture
def served(monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "serve_until_stopped", lambda *given: calls.append(given))
    return calls


def test_help_lists_the_commands(shown):
    code, text = shown("--help")
    assert code == 0
    assert [command for command in COMMANDS if not re.search(rf"^ +{command} ", text, re.M)] == []


def test_serve_help_lists_every_flag_with_its_default(shown):
    code, text = shown("serve", "--help")
    assert code == 0
    entries = {found[1]: " ".join(found[0].split()) for found in re.finditer(r"^ +(--[a-z-]+).*(?:\n {10,}.*)*", text, re.M)}
    assert set(entries) - {"--help"} == set(SERVE_FLAGS)
    for flag, default in SERVE_FLAGS.items():
        if default is not None:
            assert re.search(rf"\[default: {re.escape(default)}[;\]]", entries[flag]), entries[flag]


def test_the_defaults_that_are_shown_are_those_that_hold(shown, served):
    assert shown("serve", "/models/tiny")[0] == 0
    config, doors, _ = served[0]
    assert doors == Doors("127.0.0.1", 8000, 9000, None)
    assert config == ShoalConfig(name="tiny", model={"path": "/models/tiny"})
    assert (config.router.replicas, config.expert_host.replicas, config.router.gpus, config.expert_host.gpus) == (1, 2, 1, 1)
    assert (config.model.dtype, config.model.device, config.model.max_model_len) == ("auto", "auto", None)


def test_every_flag_reaches_its_place(shown, served):
    given = {
        "--name": "n",
        "--http-port": 81,
        "--grpc-port": 91,
        "--host": "0.0.0.0",
        "--routers": 3,
        "--expert-hosts": 4,
        "--dtype": "bfloat16",
        "--device": "cuda",
        "--gpus-per-router": 0.5,
        "--gpus-per-host": 0.25,
        "--max-model-len": 77,
        "--address": "auto",
    }
    given |= {"--keys": "/k.yaml", "--certificate": "/c.pem", "--certificate-key": "/p.pem"}
    assert set(given) == set(SERVE_FLAGS) - {"--config", "--insecure"}
    flags = [str(word) for pair in given.items() for word in pair] + ["--insecure"]
    assert shown("serve", "/models/tiny", *flags)[0] == 0
    config, doors, _ = served[0]
    assert doors == Doors("0.0.0.0", 81, 91, "auto")
    assert (config.name, config.router.replicas, config.expert_host.replicas) == ("n", 3, 4)
    assert (config.model.dtype, config.model.device, config.model.max_model_len) == ("bfloat16", "cuda", 77)
    assert (config.router.gpus, config.expert_host.gpus) == (0.5, 0.25)
    security = config.security
    assert (security.keys_file, security.certificate_file, security.certificate_key_file) == ("/k.yaml", "/c.pem", "/p.pem")
    assert security.insecure


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_no_such_port(shown, served, flag, port):
    code, text = shown("serve", "/models/tiny", flag, port)
    assert code == 2
    assert flag in text
    assert not served


@pytest.mark.parametrize("text", ["router:\n", "name: of-the-file\n"])
def test_config_prints_what_loads_back(shown, tmp_path, text):
    file = tmp_path / "shoal.yaml"
    file.write_text(text)
    code, printed = shown("config", "/models/tiny", "--config", str(file))
    assert code == 0
    document = yaml.safe_load(printed)
    (application,) = document["applications"]
    assert application["import_path"] == "cluster.app:build"
    wanted = read_config(file, {"model.path": "/models/tiny"})
    assert application["name"] == wanted.name
    assert ShoalConfig.model_validate(application["args"]) == wanted
    assert document["grpc_options"]["grpc_servicer_functions"] == GRPC_SERVICES


def test_config_says_that_gateways_want_keys(tmp_path):
    notes = []
    for flags in ([], ["--config", str(tmp_path / "open.yaml")]):
        (tmp_path / "open.yaml").write_text("security: {insecure: true}\n")
        result = CliRunner().invoke(cli.app, ["config", "/models/tiny", *flags])
        assert yaml.safe_load(result.stdout)["applications"]
        notes.append(result.stderr)
    assert "security.keys_file" in notes[0]
    assert notes[1] == ""


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path):
    file = tmp_path / "keys.yaml"
    flags = ["--scope", "inference", "--scope", "operator", "--requests-per-minute", "7"]
    made = CliRunner().invoke(cli.app, ["keys", "new", "alice", "--file", str(file), *flags])
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert key not in file.read_text()
    (entry,) = parse_keys(file.read_text(), "")
    assert KeyRing([entry]).find(key) is entry
    assert (entry.id, entry.scopes, entry.requests_per_minute, entry.tokens_per_minute) == ("alice", {"inference", "operator"}, 7, None)
    shown_one = CliRunner().invoke(cli.app, ["keys", "new", "bob"])
    (entry,) = parse_keys(shown_one.stderr.partition("\n")[2], "")
    assert KeyRing([entry]).find(shown_one.stdout.strip()) is entry
    assert entry.scopes == {"inference"}


def test_a_key_s_name_that_is_none_is_a_sentence(capsys, tmp_path):
    assert "keys[0].id" in sentence_of(capsys, "keys", "new", "no name")


@pytest.mark.parametrize(("flags", "said"), [(["--host", "0.0.0.0"], "--insecure"), (["--keys", "/none/keys.yaml"], "/none/keys.yaml")])
def test_an_open_door_and_keys_that_are_not_there_are_sentences(capsys, tmp_path, flags, said):
    tiny = write_tiny("v2-lite", tmp_path)
    assert said in sentence_of(capsys, "serve", str(tiny), *flags)


def test_config_does_not_print_the_secret(shown, tmp_path):
    file = tmp_path / "shoal.yaml"
    file.write_text("security: {secret: 0123456789abcdef0}\n")
    assert "0123456789abcdef0" not in shown("config", "/models/tiny", "--config", str(file))[1]


def sentence_of(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert left.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("shoal: ")
    assert "\n" not in said
    return said


def test_a_directory_that_is_not_there_is_a_sentence(capsys, tmp_path):
    assert str(tmp_path / "none") in sentence_of(capsys, "serve", str(tmp_path / "none"))


def test_equal_ports_are_a_sentence(capsys, tmp_path):
    assert "both 9000" in sentence_of(capsys, "serve", str(tmp_path), "--http-port", "9000")


def test_an_unknown_key_is_a_sentence(capsys, tmp_path):
    file = tmp_path / "shoal.yaml"
    file.write_text("router: {replica: 2}\n")
    assert "router.replica:" in sentence_of(capsys, "serve", str(tmp_path), "--config", str(file))


def test_a_ray_that_cannot_start_is_a_sentence(capsys, tmp_path, monkeypatch):
    def fails(**options):
        raise Exception("The current node timed out during startup.")

    tiny = write_tiny("v2-lite", tmp_path)
    monkeypatch.setattr(serving.ray, "init", fails)
    monkeypatch.setattr(serving._StopSignal, "listen", lambda self: None)
    with socket.socket() as http, socket.socket() as grpc:
        for probe in (http, grpc):
            probe.bind(("", 0))
        ports = [str(probe.getsockname()[1]) for probe in (http, grpc)]
    said = sentence_of(capsys, "serve", str(tiny), "--http-port", ports[0], "--grpc-port", ports[1])
    assert "Ray cannot start on this machine: The current node timed out" in said


class FakeServe:
    """Remembers what was taken down."""

    def __init__(self, applications=()):
        self.applications, self.calls = dict.fromkeys(applications), []

    def status(self):
        return self

    def shutdown(self):
        self.calls.append("shutdown")

    def delete(self, name):
        self.calls.append(name)
        raise RuntimeError("There is no Serve instance running")


@pytest.mark.parametrize(("ours", "deployed", "calls"), [(True, False, ["shutdown"]), (False, False, []), (False, True, ["app"])])
def test_only_what_is_ours_is_taken_down(monkeypatch, ours, deployed, calls):
    fake, left = FakeServe(), []
    monkeypatch.setattr(serving, "serve", fake)
    monkeypatch.setattr(serving.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serving.ray, "shutdown", lambda: left.append(True))
    stay = serving._Stay("app", ray_is_ours=ours)
    stay.deployed = deployed
    stay.end()
    assert (fake.calls, left) == (calls, [True])


class NodeContext:
    def get_node_id(self):
        return "n1"


class Client:
    def get_serve_details(self):
        return {"http_options": {"host": "127.0.0.1", "port": 81}, "grpc_options": {"port": 91, "grpc_servicer_functions": GRPC_SERVICES}}


def test_a_name_that_is_served_already_is_refused(monkeypatch):
    monkeypatch.setattr(serving, "serve", FakeServe(["app"]))
    monkeypatch.setattr(serving.ray, "get_runtime_context", NodeContext)
    monkeypatch.setattr(serving, "_get_global_client", lambda raise_if_no_controller_running: Client())
    with pytest.raises(StartError, match=r"an application app is already served at 10\.0\.0\.1:6379"):
        serving._agree_on_doors("app", Doors(address="10.0.0.1:6379"))
    assert serving._agree_on_doors("other", Doors(address="auto")) == Doors("127.0.0.1", 81, 91, "auto")


def test_our_ports_are_checked_where_serve_would_bind_them(monkeypatch):
    checked, nodes = [], [{"NodeID": "n1", "Resources": {}}]
    monkeypatch.setattr(serving.ray, "get_runtime_context", NodeContext)
    monkeypatch.setattr(serving.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(serving, "_get_global_client", lambda raise_if_no_controller_running: None)
    monkeypatch.setattr(serving, "check_ports", checked.append)
    doors = Doors(address="auto")
    assert serving._agree_on_doors("app", doors) == doors
    assert checked == []
    nodes[0]["Resources"][serving.HEAD] = 1.0
    assert serving._agree_on_doors("app", doors) == doors
    assert checked == [doors]
