"""Debian's Chromium without a screen, spoken to by its DevTools protocol over a pipe: no driver, no port, no package.

with Chromium(tmp_path) as browser:
    page = browser.page
    page.open(url)
    page.wait_for("document.title === 'x'")
    page.screenshot(file)
"""

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium")
ABSENT = "no chromium here (Debian: apt-get install chromium)"
CALL_TIMEOUT_S = 30.0
KEY_CODES = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--lang=en",
)


class Chromium:
    """Context manager; `page` is its one page. Its process group ends with it."""

    def __init__(self, directory: Path) -> None:
        assert BINARY is not None, ABSENT
        self._waiting: dict[int, dict[str, Any] | None] = {}
        self._arrived = threading.Condition()
        self._is_over = False
        self._number = 0
        to_browser, self._to_browser = os.pipe()
        self._from_browser, from_browser = os.pipe()
        # The protocol's pipe is descriptors 3 and 4; ours may be just these, so they move out of the way first.
        reading, writing = (fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (to_browser, from_browser))
        self._log = (directory / "chromium.log").open("wb")
        command = [BINARY, *FLAGS, f"--user-data-dir={directory / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{reading} 4>&{writing}; exec "$@"', "chromium", *command],
            pass_fds=(reading, writing),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HOME": str(directory)},
            start_new_session=True,
        )
        for fd in (to_browser, from_browser, reading, writing):
            os.close(fd)
        self.page = Page(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Chromium":
        try:
            self.page.attach()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser, its children with it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5.0)
        os.close(self._to_browser)
        os.close(self._from_browser)
        self._log.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One call of the protocol; its error is an AssertionError."""
        with self._arrived:
            self._number += 1
            number = self._number
            self._waiting[number] = None
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting[number] is not None or self._is_over, CALL_TIMEOUT_S)
            answer = self._waiting.pop(number)
        assert answer is not None, f"{method} was not answered; see {self._log.name}"
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._from_browser, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                with self._arrived:
                    if message.get("id") in self._waiting:
                        self._waiting[message["id"]] = message
                        self._arrived.notify_all()
                    elif "method" in message:
                        self.page.hear(message["method"], message["params"])
        with self._arrived:
            self._is_over = True
            self._arrived.notify_all()


@dataclass
class Page:
    """`errors` is what the console would show in red; `addresses` is all that was asked for."""

    browser: Chromium
    errors: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    session: str = ""

    def attach(self) -> None:
        targets = self.browser.call("Target.getTargets")["targetInfos"]
        (target,) = [target["targetId"] for target in targets if target["type"] == "page"]
        self.session = self.browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"]))

    def open(self, url: str) -> None:
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"
        self.wait_for("document.readyState === 'complete'")

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """The window's size in CSS pixels, and what the user prefers: "light" or "dark"."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def wait_for(self, expression: str, timeout_s: float = 20.0) -> None:
        """Until `expression` is true, an element among what is."""
        until = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < until, f"not within {timeout_s} s: {expression}; errors: {self.errors}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEY_CODES[key])

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path, height: int | None = None) -> None:
        """A picture of the page, or of its uppermost `height` pixels; the file's ending says of which kind, png or webp."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height or size["height"]), "scale": 1}
        kind = {"format": "png"} if file.suffix == ".png" else {"format": "webp", "quality": 82}
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip, **kind)["data"]
        file.write_bytes(base64.b64decode(picture))
