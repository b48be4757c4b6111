"""The dashboard of a real application in Debian's Chromium: a host is killed under load, and is seen to die and to come back.

With SHOAL_PICTURES=DIRECTORY it takes its time, and leaves there the pictures that the README shows.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.chromium import ABSENT, BINARY, Chromium, Page
from tests.cluster.conftest import Shoals
from tests.cluster.load import Load, ask_all
from tests.cluster.replicas import is_whole, pids_of
from tests.demo_checkpoint import demo_paths

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), pytest.mark.skipif(BINARY is None, reason=ABSENT)]

NUM_HOSTS, NUM_TOKENS = 3, 48
PROMPTS = [(11, 12, 13), (21, 22), (31, 32, 33, 34), (41,)]
PICTURES = os.environ.get("SHOAL_PICTURES")
CALM_S = 25.0  # of history, before the host dies and after it is back: for pictures only
SETTINGS = {
    "expert_host__replicas": NUM_HOSTS,
    "expert_host__slots": 256,
    "placement__min_replicas": 2,
    "dashboard__price_per_host_hour": 0.12,
}
READY = "document.querySelectorAll('#hosts > li[data-tone=good]').length"
GONE = "document.querySelectorAll('#hosts > li[data-tone=gone]').length"


def leave_pictures(page: Page, name: str) -> None:
    if PICTURES is None:
        return
    for width, height, scheme in ((1280, 900, "dark"), (400, 800, "light")):
        page.look(width, height, scheme)
        page.wait_for(f"document.querySelector('#heat-canvas').getBoundingClientRect().width < {width}")
        page.evaluate("new Promise(done => setTimeout(done, 1500))")  # a poll, and what it draws
        page.screenshot(Path(PICTURES) / f"dashboard-{name}-{width}.webp", 1500)
    page.look(1280, 900, "dark")


def calm() -> None:
    if PICTURES is not None:
        time.sleep(CALM_S)


def test_a_killed_host_is_seen_to_die_and_to_come_back(shoals: Shoals, tmp_path: Path, record_property):
    with shoals.running(demo_paths().mixtral, "watched", **SETTINGS) as app, Chromium(tmp_path) as browser:
        answers = ask_all(app, PROMPTS, NUM_TOKENS)
        page = browser.page
        page.look(1280, 900, "dark")
        page.open(f"{app.http}/dashboard")
        page.wait_for(f"{READY} === {NUM_HOSTS}", 60.0)
        with Load(app, answers, len(PROMPTS), NUM_TOKENS) as load:
            page.wait_for("parseFloat(document.querySelector('#tile-tokens').textContent) > 1", 60.0)
            page.wait_for("document.querySelector('#tile-gap').textContent.includes('ms')", 60.0)
            page.wait_for("document.querySelector('#tile-cost').textContent.includes('$')", 60.0)
            calm()
            killed_s = time.monotonic()
            os.kill(pids_of(app, "ExpertHost")[0], signal.SIGKILL)
            page.wait_for("document.querySelector('#hosts > li[data-tone=bad], #hosts > li[data-tone=gone]')", 30.0)
            noticed_s = time.monotonic() - killed_s
            page.wait_for(f"{GONE} === 1", 30.0)
            gone_s = time.monotonic() - killed_s
            page.wait_for("document.querySelector('#events').textContent.includes('its lease ended')")
            leave_pictures(page, "host-lost")
            page.wait_for(f"{READY} === {NUM_HOSTS}", 120.0)
            back_s = time.monotonic() - killed_s
            assert "3 of 3 ready" in page.text("#hosts-note")
            until = time.monotonic() + 30
            while not is_whole(app, NUM_HOSTS, 2):
                assert time.monotonic() < until, app.view()["decisions"][-8:]
                time.sleep(0.2)
            calm()
            leave_pictures(page, "host-back")
        assert load.problems == []
        assert page.errors == []
        assert all(address.startswith(app.http) for address in page.addresses if address != "about:blank")
        told = f"on the page after the kill: noticed {noticed_s:.1f} s, gone {gone_s:.1f} s, all ready again {back_s:.1f} s"
        print(told)
        record_property("dashboard", told)
