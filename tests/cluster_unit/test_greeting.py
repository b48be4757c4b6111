import io
import threading
import time
from dataclasses import dataclass

import pytest
from rich.console import Console

from cluster import greeting
from cluster.errors import RequestFailed
from cluster.greeting import Address
from cluster.guard.setup import OwnKeys

NO_KEYS = OwnKeys()


@dataclass
class Flag:
    requested: bool = False


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def greeted(console, monkeypatch, http, grpc, stop=None, keys=NO_KEYS):
    monkeypatch.setattr(greeting, "_ask_http", lambda address: http())
    monkeypatch.setattr(greeting, "_ask_grpc", lambda address: grpc())
    greeting.greet(console, Address("tiny", "http://127.0.0.1:1", "127.0.0.1:2", keys), stop or Flag())
    return console.file.getvalue()


def test_an_answer_is_text_and_no_markup(console, monkeypatch):
    shown = greeted(console, monkeypatch, lambda: "a [/x] [bold]b\n\x1b[2Jc", lambda: "[/]")
    assert "HTTP  The capital of France is a [/x] [bold]b [2Jc\n" in shown
    assert "gRPC  The capital of France is [/]\n" in shown
    assert "\x1b" not in shown


def fails(error):
    raise error


@pytest.mark.parametrize("error", [RequestFailed("gone [/x]"), KeyError("choices"), ValueError("not JSON"), OSError("reset")])
def test_a_failure_is_a_line_and_serving_goes_on(console, monkeypatch, error):
    shown = greeted(console, monkeypatch, lambda: fails(error), lambda: "Paris")
    assert f"HTTP  no answer: {error}" in shown
    assert "France is Paris" in shown
    assert "Ctrl-C stops it." in shown


def test_a_terminal_that_cannot_show_it_is_logged(monkeypatch, caplog):
    narrow = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=200)
    monkeypatch.setattr(greeting, "_ask_http", lambda address: "你好")
    monkeypatch.setattr(greeting, "_ask_grpc", lambda address: "你好")
    greeting.greet(narrow, Address("tiny", "http://127.0.0.1:1", "127.0.0.1:2"), Flag())
    assert "serving goes on" in caplog.text


def test_stop_is_acted_on_while_a_door_is_silent(console, monkeypatch):
    stop, release = Flag(), threading.Event()

    def silent():
        stop.requested = True
        release.wait(30)
        return "late"

    started = time.monotonic()
    shown = greeted(console, monkeypatch, silent, silent, stop)
    assert time.monotonic() - started < 10
    assert shown == ""
    release.set()


def test_a_silent_door_is_named(console, monkeypatch):
    monkeypatch.setattr(greeting, "TIMEOUT_S", 0.2)
    release = threading.Event()
    shown = greeted(console, monkeypatch, lambda: str(release.wait(30)), lambda: "Paris")
    assert "HTTP  no answer: none within" in shown
    release.set()


def test_grpcurl_names_the_application(console, monkeypatch):
    assert "-H 'application: tiny'" in greeted(console, monkeypatch, lambda: "a", lambda: "b")


def test_what_to_try_next_has_the_keys_that_it_needs(console, monkeypatch):
    drawn = greeted(console, monkeypatch, lambda: "a", lambda: "b", keys=OwnKeys(grpc="shoal-drawn", is_for_clients=True))
    assert drawn.count("authorization: Bearer") == 1
    assert "-H 'application: tiny' -H \"authorization: Bearer shoal-drawn\"" in drawn
    own = greeted(console, monkeypatch, lambda: "a", lambda: "b", keys=OwnKeys("shoal-own", "shoal-own")).removeprefix(drawn)
    assert own.count('authorization: Bearer $SHOAL_API_KEY"') == 2
    assert "shoal-own" not in own
