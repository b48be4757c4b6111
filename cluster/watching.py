"""`shoal status --watch`: the screen again and again, in its place on a terminal, one below the other elsewhere."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.errors import RequestFailed
from cluster.status import status_screen

INTERVAL_S = 1.0
Fetch = Callable[[], dict[str, Any]]
Rest = Callable[[float], None]


class Frames:
    """Frames of one application. While it does not answer the last one stays, with a line that says so. Raises RequestFailed at first."""

    def __init__(self, url: str, fetch: Fetch, clock: Callable[[], float] = time.time) -> None:
        self._url = url
        self._fetch = fetch
        self._clock = clock
        self._last: dict[str, Any] | None = None

    def next(self) -> Group:
        """The frame for now."""
        problem = None
        try:
            self._last = self._fetch()
        except RequestFailed as error:
            if self._last is None:
                raise
            problem = Text(str(error), "bold red")
        now = self._clock()
        title = Text.assemble((self._url, "bold"), "   ", (time.strftime("%H:%M:%S", time.localtime(now)), "dim"), "   Ctrl-C ends it")
        lines: list[RenderableType] = [title, *([problem] if problem else []), Text(), status_screen(self._last, now)]
        return Group(*lines)


def watch(frames: Frames, console: Console, interval_s: float = INTERVAL_S, rest: Rest = time.sleep) -> None:
    """Until Ctrl-C, after which the last frame stands. Raises RequestFailed if there is not even a first one."""
    frame = frames.next()
    # The alternate screen is drawn over, never cleared: nothing flickers.
    place = Live(frame, console=console, screen=True, auto_refresh=False) if console.is_terminal else contextlib.nullcontext()
    with contextlib.suppress(KeyboardInterrupt), place as live:
        while True:
            if live is None:
                console.print(frame, Text(), highlight=False)
            else:
                live.update(frame, refresh=True)
            rest(interval_s)
            frame = frames.next()
    if console.is_terminal:
        console.print(frame, highlight=False)


def watch_json(fetch: Fetch, interval_s: float = INTERVAL_S, rest: Rest = time.sleep) -> None:
    """The whole view as one line of JSON per interval, until Ctrl-C. Raises RequestFailed when it cannot be had."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(json.dumps(fetch()), flush=True)
            rest(interval_s)
