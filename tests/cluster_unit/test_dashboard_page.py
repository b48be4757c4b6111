"""The page's files over HTTP: everything is there, nothing is from elsewhere, and every gateway has it."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from cluster.api.control import ClusterControl
from cluster.config import DashboardSettings
from cluster.dashboard.page import add_dashboard, page_files
from cluster.gateway import Gateway
from tests.cluster_unit.front_door import STILL, VIEW, StillCoordinator, make_service, says

STATIC = files("cluster.dashboard").joinpath("static")


def client(control=STILL, clock=lambda: 0.0):
    app = FastAPI()
    add_dashboard(app, control, "tiny", DashboardSettings(), lambda: 1e9, clock)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_gateway_serves_the_page_its_files_and_its_data():
    service, _ = make_service(None, says([5]))
    app = Gateway(service, STILL, lambda: True, DashboardSettings(price_per_host_hour=3)).__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        page = await http.get("/dashboard")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for address in re.findall(r'(?:href|src)="(dashboard/[^"]+)"', page.text):
            assert (await http.get(f"/{address}")).status_code == 200
        data = (await http.get("/cluster/dashboard")).json()
        assert (data["model"], data["price_per_hour"]) == ("tiny", 9.0)
        assert (await http.get("/dashboard/none.js")).status_code == 404


async def test_files_are_kept_by_the_browser_until_they_change():
    async with client() as http:
        first = await http.get("/dashboard/main.js")
        assert first.headers["content-type"].startswith("text/javascript")
        again = await http.get("/dashboard/main.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


async def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline():
    async with client() as http:
        policy = (await http.get("/dashboard")).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_no_file_names_an_address_elsewhere_or_has_anything_inline():
    for name, file in page_files().items():
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]{2,}/", text), name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        if name.endswith(".html"):
            assert not re.search(r"\son[a-z]+=|\sstyle=|<style|<script(?! type=\"module\" src=)", text), name


def test_every_file_is_in_the_package():
    patterns = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cluster"]
    assert "dashboard/static/*" in patterns
    assert {entry.name for entry in STATIC.iterdir()} == set(page_files())


async def test_a_slash_at_the_end_leads_to_the_page():
    async with client() as http:
        answer = await http.get("/dashboard/")
        assert (answer.status_code, answer.headers["location"]) == (307, "../dashboard")


async def test_pages_side_by_side_share_a_view_and_no_error():
    class Counting(StillCoordinator):
        asked = 0

        async def view(self):
            self.asked += 1
            if self.asked == 2:
                raise RuntimeError
            return VIEW

    coordinator, times = Counting(), iter([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 5.3])
    async with client(ClusterControl(coordinator), lambda: next(times)) as http:
        for _ in range(3):
            assert (await http.get("/cluster/dashboard")).status_code == 200
        assert coordinator.asked == 1
        with pytest.raises(RuntimeError):
            await http.get("/cluster/dashboard")
        assert (await http.get("/cluster/dashboard")).status_code == 200
        assert coordinator.asked == 3


def luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_can_be_read_on_every_ground(theme):
    """WCAG 2.2: 4.5 for text, 3 for marks."""
    root = re.findall(r":root \{(.*?)\}", STATIC.joinpath("style.css").read_text(), re.DOTALL)[theme]
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", root))
    for ground in ("ground", "surface", "raised"):
        for name, least in {
            "text": 7,
            "faint": 4.5,
            "accent": 4.5,
            "second": 4.5,
            "good": 4.5,
            "warn": 4.5,
            "bad": 4.5,
            "plain": 3,
        }.items():
            lighter, darker = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= least, (name, ground)
