"""The commands of an operator, as typed, against a front door over a real Coordinator with made-up members."""

import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import cli, operating
from cluster.api.cluster_parts import status_part
from cluster.client import Refused, fetch_status, fetch_view
from cluster.errors import RequestFailed
from cluster.operating import ask_drain, ask_scaling, changes, follow
from cluster.status import host_state, status_screen
from cluster.watching import Frames, watch, watch_json
from tests.cluster_unit.running_cluster import RunningCluster, listening
from tests.free_ports import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster():
    return RunningCluster()


@pytest.fixture
def url(cluster):
    with listening(cluster.control()) as address:
        yield address


@pytest.fixture
def typed(url, monkeypatch):
    """Runs `shoal ...` as typed; its exit status and all that it printed."""
    monkeypatch.setattr(operating, "POLL_S", 0.0)

    def run(*arguments):
        result = CliRunner().invoke(cli.app, [*arguments, "--url", url], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


def screen(status, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(status_screen(status, 1e9 + 110), highlight=False)
    return console.file.getvalue()


# -- operations


def test_a_drain_is_followed_to_its_end_with_a_line_per_change(typed, cluster):
    code, text = typed("drain", "host-a")
    lines = text.splitlines()
    assert code == 0
    assert re.fullmatch(r"\d\d:\d\d:\d\d drain-1-1 running: \d+ replicas to load", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d drain-1-1 done: the host holds no expert, and no map in use names it", lines[-1])
    assert len(lines) == len({line[9:] for line in lines}) == 2
    assert cluster.hosts[0].ready == frozenset()


def test_a_rebalance(typed, cluster):
    cluster.overload(cluster.hosts[1])
    code, text = typed("rebalance")
    assert (code, len(text.splitlines())) == (0, 2)
    assert "rebalance-1-1 done" in text


def test_bounds(typed, cluster):
    assert typed("scale", "expert-host", "--max", "6")[0] == 0
    assert cluster.coordinator.bounds.by_role == {"expert_host": {"max_replicas": 6.0}}
    assert typed("scale", "router", "--min", "1", "--max", "2")[0] == 0
    code, text = typed("scale", "expert-host", "--reset")
    assert (code, cluster.coordinator.bounds.by_role) == (0, {"router": {"min_replicas": 1.0, "max_replicas": 2.0}})
    assert "done: every replica has been told" in text


@pytest.mark.parametrize("arguments", [["scale", "router"], ["scale", "router", "--reset", "--min", "1"], ["scale", "host", "--min", "1"]])
def test_bounds_that_are_not_said(typed, cluster, arguments):
    code, text = typed(*arguments)
    assert (code, cluster.coordinator.view()["operations"]) == (2, [])
    assert "Usage" in text


def test_what_is_rolled_back_is_a_failure_with_its_reason(monkeypatch):
    monkeypatch.setattr(operating, "POLL_S", 0.0)
    with listening(RunningCluster(num_hosts=2).control()) as url:
        result = CliRunner().invoke(cli.app, ["drain", "host-a", "--url", url])
    assert result.exit_code == 1
    assert "rolled back: the host stays as it is" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["drain", "host/z"], "there is no expert host host/z; those alive: host-a, host-b, host-c"),
        (["scale", "expert-host", "--max", "9"], "expert_host.max_replicas: 9 is above the configured ceiling, 8"),
        (["scale", "gateway", "--max", "2"], "gateway: keeps a fixed number of replicas here"),
    ],
)
def test_a_refusal_is_the_servers_sentence(url, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--url", url])
    assert left.value.code == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "\n" not in said


def test_a_coordinator_that_restarts_is_waited_for_and_one_that_forgot_is_not(url, monkeypatch):
    answers = [Refused("away", 503, "coordinator_away")] * 3
    asked = operating.ask_json

    def ask(*arguments):
        if answers and "operations" in arguments[0]:
            raise answers.pop()
        return asked(*arguments)

    monkeypatch.setattr(operating, "ask_json", ask)
    operation = ask_drain(url, "host-a")
    assert [change["state"] for change in changes(url, operation, lambda _: None)] == ["running", "done"]
    for status, code, num in ((404, "unknown_operation", 1), (503, "coordinator_away", 1000)):
        answers[:] = [Refused(code, status, code)] * num
        with pytest.raises(Refused, match=code):
            list(changes(url, ask_scaling(url, "router", None, 2), lambda _: None))
    assert answers, "it is not waited for without end"


def test_ctrl_c_leaves_the_operation_to_itself(url, cluster):
    def leave(_):
        raise KeyboardInterrupt

    with pytest.raises(RequestFailed, match=r"drain-1-1 goes on: see `shoal status`"):
        follow(url, ask_drain(url, "host-a"), Console(file=io.StringIO()), leave)
    assert cluster.coordinator.operation("drain-1-1").is_open


# -- status


def test_the_screen_shows_what_an_operator_looks_for(typed, cluster):
    cluster.coordinator.saving.failed("no Redis answers at redis://x")
    cluster.coordinator.drain("host-b")
    cluster.rounds(1)
    code, text = typed("status")
    assert code == 0
    version = cluster.coordinator.maps.current.version
    for wanted in (
        rf"placement +map {version.epoch}\.{version.n}   16 experts, 16 replicas, 16 stand alone",
        r"balancedness +\d\.\d\d of the last 5 s   \d\.\d\d as planned",
        r"state store +memory   away: no Redis answers",
        r"host-a +node +\w+ +\d+(?: of \d+)? +12 +\d+ MiB +45% +2\.0 ms +90",
        r"host-b +node +draining +\d+ of 0 ",
        r"router-a +node +map \d+ +4 +0 +25%",
        r"layer [12] expert 7 +22\.2% +72 +1",
        r"expert-host +3 +2 +4 +8 +as configured",
        r"drain-1-1 running: \d+ replicas to load",
        r"\d\d:\d\d:\d\d +planned \(drain-1-1\)",
    ):
        assert re.search(wanted, text), f"{wanted}\n{text}"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_screen_has_a_line_for_everything_at_any_width(cluster, url, width):
    cluster.coordinator.drain("host-b")
    status = fetch_status(url)
    lines = screen(status, width).splitlines()
    assert max(map(len, lines)) <= width
    joined = " ".join(" ".join(lines).split())
    for decision in status["decisions"][-2:]:
        assert " ".join(decision["text"].split()[-3:]) in joined


def test_a_cluster_that_has_just_begun():
    cluster = RunningCluster(num_hosts=0)
    text = screen(status_part(cluster.coordinator.view()))
    assert "no map published yet" in text
    assert re.search(r"expert hosts +none", text)


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "ready"),
        ({"suspected": True, "is_drained": True}, "suspected"),
        ({"is_leaving": True}, "leaving"),
        ({"is_drained": True}, "draining"),
        ({"is_drained": True, "ready": 0}, "draining"),
        ({"is_drained": True, "ready": 0, "published": 0, "desired": 0}, "drained"),
        ({"ready": 3}, "loading"),
        ({"loading": 1}, "loading"),
        ({"ready": 0, "desired": 0, "published": 0}, "empty"),
    ],
)
def test_one_word_for_a_hosts_state(fields, state):
    host = {"suspected": False, "is_leaving": False, "is_drained": False, "loading": 0, "ready": 4, "desired": 4, "published": 4}
    assert host_state(host | fields) == state


def test_json_is_the_whole_view(typed, url, cluster):
    code, text = typed("status", "--json")
    assert code == 0
    view = json.loads(text)
    assert set(view) == set(cluster.coordinator.view())
    assert view["placement"] == cluster.coordinator.view()["placement"]
    assert view["scaling"]["expert_host"]["ceiling"] == 8
    assert set(view) == set(fetch_view(url))


def test_nobody_answers(capsys):
    for flags in ([], ["--json"], ["--watch"], ["--watch", "--json"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["status", "--url", f"http://127.0.0.1:{free_port()}", *flags])
        assert left.value.code == 1
        assert "is `shoal serve` running there" in capsys.readouterr().err


# -- watching


class Rest:
    """Lets some frames pass, and is then Ctrl-C."""

    def __init__(self, num_frames, between=lambda: None):
        self.left, self.between, self.intervals = num_frames, between, []

    def __call__(self, interval_s):
        self.intervals.append(interval_s)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.between()


def test_elsewhere_than_on_a_terminal_a_frame_per_interval(cluster, url):
    console = Console(file=io.StringIO(), width=120)
    rest = Rest(3, cluster.rounds)
    watch(Frames(url, lambda: fetch_status(url)), console, 1.0, rest)
    text = console.file.getvalue()
    assert rest.intervals == [1.0] * 3
    assert text.count("placement    map") == 3
    assert "\x1b" not in text


def test_on_a_terminal_it_is_drawn_over_in_its_place_and_the_last_frame_stands(cluster, url):
    console = Console(file=io.StringIO(), width=120, height=50, force_terminal=True)
    watch(Frames(url, lambda: fetch_status(url)), console, 1.0, Rest(3, cluster.rounds))
    text = console.file.getvalue()
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1, "the alternate screen, left again"
    assert "\x1b[2J" not in text.split("\x1b[?1049h")[1], "never cleared: that is what flickers"
    assert "placement" in text.split("\x1b[?1049l")[1]


def test_the_last_frame_stays_while_nobody_answers(url):
    answers = [fetch_status(url)]

    def fetch():
        if not answers:
            raise RequestFailed("nothing answers")
        return answers.pop()

    console = Console(file=io.StringIO(), width=120)
    watch(Frames(url, fetch), console, 1.0, Rest(2))
    first, second = console.file.getvalue().split("Ctrl-C ends it")[1:]
    assert "nothing answers" not in first
    assert "nothing answers" in second
    assert "host-a" in second


def test_watching_in_json_is_a_line_per_interval(url, capsys):
    watch_json(lambda: fetch_view(url), 1.0, Rest(2))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["num_experts"] for line in lines] == [16, 16]


def test_ctrl_c_ends_it_without_a_word(url):
    command = [sys.executable, "-m", "cluster.cli", "status", "--watch", "--url", url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        seen = 0
        while seen < 2:
            seen += "Ctrl-C ends it" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")


# -- the README


def operating_section():
    section = (ROOT / "README.md").read_text().split("\n## Operating it\n")[1].split("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def test_the_readmes_commands_run(typed, cluster):
    commands = [shlex.split(line, comments=True)[1:] for line in operating_section() if line.startswith(".venv/bin/shoal ")]
    assert {command[0] for command in commands} == {"status", "drain", "rebalance", "scale"}
    for command in commands:
        if "--watch" in command:
            continue  # has no end
        if command[0] == "drain":
            command[1] = "host-a"
        assert typed(*command)[0] == 0, command


def test_the_readmes_curls_are_taken(url):
    lines = [shlex.split(line) for line in operating_section() if line.startswith("curl ")]
    assert len(lines) >= 2
    for words in lines:
        (address,) = (word for word in words if word.startswith("http://127.0.0.1:8000/"))
        options = dict(itertools.pairwise(words))
        body = options.get("-d")
        response = httpx.request(
            options.get("-X", "GET"),
            address.replace("http://127.0.0.1:8000", url),
            content=body,
            headers={"content-type": "application/json"} if body else {},
        )
        assert response.status_code == 202, response.text


def test_the_readmes_screen_is_laid_out_as_ours(cluster, url):
    """Its headings are those that are printed now; its numbers are of a day gone by."""
    shown = " ".join(" ".join(operating_section()).split())
    cluster.coordinator.drain("host-b")
    for line in screen(fetch_status(url), 110).splitlines():
        if line.startswith(("expert hosts", "routers", "bounds of", "hottest", "operations", "last decisions")):
            assert " ".join(line.split()) in shown, line
