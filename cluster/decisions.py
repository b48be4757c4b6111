"""What the Coordinator decided and saw, as readable lines with their reasons and numbers."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("shoal")

NUM_KEPT = 256
QUIET = frozenset({"stay"})  # decisions to change nothing: to be read on request, not shown as they come


@dataclass
class Tally:
    """How many decisions there were by kind and by event, and what plans have moved; of this Coordinator, never taken back."""

    by_kind: Counter[str] = field(default_factory=Counter)
    by_event: Counter[str] = field(default_factory=Counter)
    num_moves: int = 0
    num_bytes: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """One decision."""
        self.by_kind[line["kind"]] += 1
        if "event" in line:
            self.by_event[line["event"]] += 1
        if line["kind"] == "plan":
            self.num_moves += line.get("num_moves", 0)
            self.num_bytes += line.get("num_bytes", 0)


class DecisionLog:
    """The last NUM_KEPT decisions, newest last: {n, time_unix_s, kind, text, ...numbers}. `n` counts all of them."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._lines: deque[dict[str, Any]] = deque(maxlen=NUM_KEPT)
        self._num_told = 0
        self.tally = Tally()

    def tell(self, kind: str, text: str, **numbers: float | str) -> None:
        """Notes a decision or an event, and logs it."""
        logger.info(text)
        self._num_told += 1
        self._lines.append({"n": self._num_told, "time_unix_s": round(self._wall_clock(), 3), "kind": kind, "text": text, **numbers})
        self.tally.add(self._lines[-1])

    def tell_once(self, kind: str, text: str, **numbers: float | str) -> None:
        """As `tell`, unless the last line of this kind said the same."""
        last = next((line for line in reversed(self._lines) if line["kind"] == kind), None)
        if last is None or last["text"] != text:
            self.tell(kind, text, **numbers)

    def restore(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Puts an earlier Coordinator's lines before our own."""
        earlier = [dict(line) for line in lines]
        first = max((int(line["n"]) for line in earlier), default=0)
        own = [line | {"n": first + line["n"]} for line in self._lines]
        self._lines = deque([*earlier, *own], maxlen=NUM_KEPT)
        self._num_told += first

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All that are kept, newest last."""
        return list(self._lines)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What a console shows as it happens: {n, text}."""
        return [{"n": line["n"], "text": line["text"]} for line in self._lines if line["kind"] not in QUIET]
