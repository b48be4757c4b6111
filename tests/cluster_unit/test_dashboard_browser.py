"""The page in Debian's Chromium over made-up clusters: sizes, themes, widths, hands and a gateway that goes away."""

import os
import time
from pathlib import Path

import pytest

from cluster.api.errors import CoordinatorAway
from cluster.config import DashboardSettings
from tests.chromium import ABSENT, BINARY, Chromium
from tests.cluster_unit.dashboard_server import DashboardServer
from tests.cluster_unit.made_up_views import STARTED_S, MadeUpCluster

pytestmark = pytest.mark.skipif(BINARY is None, reason=ABSENT)
PRICED = DashboardSettings(price_per_host_hour=2.4, price_per_router_hour=3.1)
# The page's second lasts a fiftieth of one.
HURRY = "const patient = setTimeout; window.setTimeout = (f, ms, ...rest) => patient(f, ms / 50, ...rest);"
# A directory to leave pictures in, for whoever wants to look; the README shows some of tests/pictures.
PICTURES = os.environ.get("SHOAL_PICTURES")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as running:
        running.page.call("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        yield running


@pytest.fixture
def page(browser):
    browser.page.open("about:blank")  # what the last test's page may still ask for is not this one's
    browser.page.errors.clear()
    browser.page.addresses.clear()
    return browser.page


def told(cluster, *, hosts=()):
    for host in hosts:
        cluster.tell("member", f"host {host} joined", STARTED_S - 90)
    cluster.tell("publish", "published map 3.6: 1728 experts on 8 hosts", STARTED_S - 80)
    cluster.tell("publish", "published map 3.7: 1728 experts on 8 hosts", STARTED_S - 60)
    cluster.tell("operation", "3-1: an operator asks for a rebalance", STARTED_S - 62)
    cluster.tell("operation", "3-1 done: balanced within 1 %", STARTED_S - 55)
    cluster.tell("rescue", "40 experts on no reachable host: 7 others load them", STARTED_S - 20)
    cluster.tell("member", "host 0badf00d has been silent for 5.1 s: its lease ended", STARTED_S - 15)
    cluster.tell("member", f"host {hosts[0] if hosts else 'x'} joined", STARTED_S - 4)
    return cluster


def leave_picture(page, name):
    if PICTURES:
        page.screenshot(Path(PICTURES) / f"dashboard-{name}.webp", 1000)


def polled(page, server, seconds):
    """Waits until the page has polled so often that so many seconds have passed on the cluster."""
    until = server.coordinator.seconds + seconds
    give_up_s = time.monotonic() + 60
    while server.coordinator.seconds < until:
        assert time.monotonic() < give_up_s, page.errors
        time.sleep(0.02)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
@pytest.mark.parametrize("size", [(27, 64, 8), (60, 256, 64)], ids=["27x64", "60x256"])
def test_every_size_fits_every_screen(page, size, width, height, scheme):
    layers, experts, hosts = size
    cluster = MadeUpCluster(layers, experts, hosts)
    told(cluster, hosts=cluster.hosts)
    with DashboardServer(cluster, PRICED) as server:
        page.look(width, height, scheme)
        page.open(server.url)
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        polled(page, server, 10 if PICTURES is None else 120)
        leave_picture(page, f"{layers}x{experts}-{width}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('#heat-canvas').getBoundingClientRect().width") > 0.8 * min(width, 900)
        assert f"{layers} layers × {experts} experts" in page.text("#heat-note")
        assert page.evaluate("document.querySelectorAll('#hosts > li').length") == hosts
        assert page.evaluate("getComputedStyle(document.body).color") == ("rgb(231, 238, 243)" if scheme == "dark" else "rgb(19, 33, 44)")
        assert page.errors == []
        assert all(address.startswith(server.url.removesuffix("dashboard")) for address in page.addresses if address != "about:blank")


def test_the_numbers_are_those_of_the_cluster(page):
    with DashboardServer(MadeUpCluster(tokens_per_s=480.0), PRICED) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("/^480/.test(document.querySelector('#tile-tokens').textContent)")
        polled(page, server, 35)
        assert page.text("#tile-tokens") == "480 generated"
        assert page.text("#tile-first") == "75 ms p50"  # 26 of 52 observations: 15 of the 30 between 50 and 100 ms, after 11
        assert page.text("#tile-balance").startswith("0.9")
        per_hour = 8 * 2.4 + 2 * 3.1
        expected = per_hour / (480 * 3600) * 1e6
        page.wait_for(f"document.querySelector('#tile-cost').textContent.startsWith('${expected:.2f}')")
        assert "8 of 8 ready" in page.text("#hosts-note")


def test_without_prices_and_latencies_their_tiles_are_hidden(page):
    with DashboardServer(MadeUpCluster(with_latency=False)) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        shown = page.evaluate(
            "[...document.querySelectorAll('.tile')].filter(tile => !tile.hidden).map(tile => tile.querySelector('h2').textContent)"
        )
        assert shown == ["Tokens per second", "Balancedness", "KV cache in use"]


def test_a_cell_tells_what_it_is_by_pointer_by_tap_and_by_keys(page):
    cluster = MadeUpCluster(27, 64, 8, first_layer=1)
    with DashboardServer(cluster) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("document.querySelector('#heat-canvas').style.height !== ''")
        box = page.evaluate("(({x, y, width}) => ({x, y, width}))(document.querySelector('#heat-canvas').getBoundingClientRect())")
        cell = (box["width"] - 34) / 64
        page.point(box["x"] + 34 + 5.5 * cell, box["y"] + 16 + 2.5 * min(18, cell))
        page.wait_for("document.querySelector('#heat-readout').textContent.startsWith('Layer 3, expert 5:')")
        readout = page.text("#heat-readout")
        assert "tokens/s" in readout
        assert all(host in readout for host in cluster.holders["3"]["5"])
        page.evaluate("document.querySelector('#heat-canvas').focus()")
        page.press("ArrowRight")
        page.press("ArrowDown")
        assert page.text("#heat-readout").startswith("Layer 4, expert 6")
        assert page.text("#heat-spoken") == page.text("#heat-readout")
        page.press("End")
        assert page.text("#heat-readout").startswith("Layer 4, expert 63")
        page.press("Home")
        page.press("ArrowUp")
        page.press("ArrowLeft")
        assert page.text("#heat-readout").startswith("Layer 3, expert 0")


def test_a_narrow_screen_turns_a_large_map_and_a_tap_still_finds_the_cell(page):
    with DashboardServer(MadeUpCluster(60, 256, 8, first_layer=3)) as server:
        page.look(400, 800)
        page.open(server.url)
        page.wait_for("document.querySelector('#heat-canvas').style.height !== ''")
        page.evaluate("document.querySelector('#heat-canvas').scrollIntoView()")
        box = page.evaluate("(({x, y, width}) => ({x, y, width}))(document.querySelector('#heat-canvas').getBoundingClientRect())")
        page.point(box["x"] + 34 + 10.5 * (box["width"] - 34) / 60, box["y"] + 16 + 100.5 * (box["width"] - 34) / 60, click=True)
        page.wait_for("document.querySelector('#heat-readout').textContent.startsWith('Layer 13, expert 100:')")


def test_a_hosts_experts_stand_out_when_it_is_chosen_and_modes_are_kept(page):
    cluster = MadeUpCluster(4, 8, 3)
    with DashboardServer(cluster) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("document.querySelector('#hosts button')")
        page.evaluate("document.querySelector('#hosts button').click(); document.querySelector('input[value=replicas]').click()")
        polled(page, server, 3)
        legend = page.text("#heat-legend")
        assert f"bright: on {cluster.hosts[0]}" in legend
        assert "1 host" in legend
        assert page.evaluate("document.querySelector('#hosts button').getAttribute('aria-pressed')") == "true"
        assert page.errors == []


def test_a_host_that_dies_and_comes_back_is_seen_to(page):
    cluster = MadeUpCluster(4, 8, 3)
    victim = cluster.hosts[1]
    with DashboardServer(cluster) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("document.querySelectorAll('#hosts > li[data-tone=good]').length === 3")
        cluster.gone.add(victim)
        cluster.tell("member", f"host {victim} has been silent for 5.0 s: its lease ended", server.now_unix_s)
        page.wait_for("document.querySelector('#hosts > li[data-tone=gone]')?.textContent.includes('gone')")
        page.wait_for("document.querySelector('#events li')?.dataset.tone === 'bad'")
        assert "1 failure" in page.text("#events-note")
        cluster.gone.clear()
        cluster.tell("member", f"host {victim} joined", server.now_unix_s)
        page.wait_for("document.querySelectorAll('#hosts > li[data-tone=good]').length === 3")
        page.wait_for("document.querySelector('#events li')?.dataset.tone === 'good'")


def test_a_gateway_that_goes_away_is_said_to_and_found_again(page):
    with DashboardServer(MadeUpCluster(4, 8, 3)) as server:
        page.look(400, 800)
        page.open(server.url)
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        server.stop()
        page.wait_for("document.querySelector('#connection').dataset.state === 'away'")
        assert "does not answer" in page.text("#connection")
        assert page.evaluate("document.querySelector('main').hasAttribute('data-stale')")
        assert page.evaluate("document.querySelectorAll('#hosts > li').length") == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        server.start()
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        page.wait_for("document.querySelector('#events').textContent.includes('hears of the cluster again')")
        assert not page.evaluate("document.querySelector('main').hasAttribute('data-stale')")


def test_a_coordinator_that_is_away_is_told_in_its_own_words(page):
    with DashboardServer(MadeUpCluster(4, 8, 3)) as server:
        page.open(server.url)
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        server.coordinator.error = CoordinatorAway("The coordinator does not answer; it may be restarting.")
        page.wait_for("document.querySelector('#connection').textContent.includes('it may be restarting')")
        server.coordinator.error = None
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")


def test_a_cluster_with_keys_asks_for_one(page):
    with DashboardServer(MadeUpCluster(4, 8, 3), key="let-me-in") as server:
        page.look(400, 800)
        page.open(server.url)
        page.wait_for("!document.querySelector('#key-form').hidden")
        page.evaluate("document.querySelector('#key').value = 'let-me-in'; document.querySelector('#key-form').requestSubmit()")
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        assert page.evaluate("document.querySelector('#key-form').hidden")
        page.open(server.url)  # the tab remembers
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        page.evaluate("sessionStorage.clear()")


def test_what_can_be_focused_has_a_name_and_tab_reaches_it(page):
    with DashboardServer(MadeUpCluster(4, 8, 3)) as server:
        page.look(1280, 900)
        page.open(server.url)
        page.wait_for("document.querySelector('#hosts button')")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        focusable = [
            node for node in nodes if any(its["name"] == "focusable" and its["value"]["value"] for its in node.get("properties", ()))
        ]
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in focusable]
        assert [role for role, name in named if not name] == []
        assert {"application", "button", "radio", "list"} <= {role for role, _ in named}
        reached = set()
        for _ in range(12):
            page.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.value || document.activeElement.tagName"))
        assert {"heat-canvas", "load", "events", "BUTTON"} <= reached
        assert page.evaluate("[...document.querySelectorAll('[role=meter]')].every(each => each.getAttribute('aria-label'))")


def test_a_dense_model_has_no_map_and_an_empty_cluster_no_error(page):
    with DashboardServer(MadeUpCluster(0, 0, 0)) as server:
        page.open(server.url)
        page.wait_for("document.querySelector('#connection').dataset.state === 'live'")
        polled(page, server, 3)
        assert page.evaluate("document.querySelector('#heat').hidden")
        assert page.errors == []
