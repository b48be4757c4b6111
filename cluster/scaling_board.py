"""What the autoscaling policies have done, told from Serve's controller to the Coordinator: a few lines in Ray's key-value store.

The policies run inside the controller, which no handle of ours reaches and where nothing may wait: each writes the whole of its board in
a thread when a number of replicas changes, which is seldom. The Coordinator looks once in a while.
"""

import json
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.autoscaling import Decision

logger = logging.getLogger("ray.serve")
NAMESPACE = "shoal-scaling"
NUM_LINES = 32


class KeyValues(Protocol):
    """Where boards lie."""

    def put(self, key: str, value: bytes) -> None:
        """Writes over what was there."""
        ...

    def get(self, key: str) -> bytes | None:
        """None where nothing is."""
        ...


class RayKeyValues:
    """Ray's own, in the head's process. Calls block for a round trip."""

    def put(self, key: str, value: bytes) -> None:
        """See KeyValues."""
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)

    def get(self, key: str) -> bytes | None:
        """See KeyValues."""
        from ray.experimental import internal_kv

        value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return value


@dataclass(frozen=True)
class Board:
    """One policy's: `origin` names its life; `counts` by (direction, cause); `lines` are the last changes, {n, time_unix_s, text}."""

    origin: str
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    lines: tuple[dict[str, Any], ...] = ()

    def as_bytes(self) -> bytes:
        """For the store."""
        counts = [[direction, cause, count] for (direction, cause), count in self.counts.items()]
        return json.dumps({"origin": self.origin, "counts": counts, "lines": self.lines}).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> "Board":
        """The reverse. ValueError or KeyError for what is no board."""
        fields = json.loads(text)
        counts = {(str(direction), str(cause)): int(count) for direction, cause, count in fields["counts"]}
        return cls(str(fields["origin"]), counts, tuple(fields["lines"]))


def board_key(application: str, role: str) -> str:
    """Where the board of one role of one application lies."""
    return f"{application}/{role}"


class BoardWriter:
    """One policy's pen. `told` returns at once; a store that is away costs the line, never a decision."""

    def __init__(self, application: str, role: str, store: KeyValues, wall_clock: Callable[[], float] = time.time) -> None:
        self._key = board_key(application, role)
        self._role = role
        self._store = store
        self._wall_clock = wall_clock
        self._origin = secrets.token_hex(8)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lines: deque[dict[str, Any]] = deque(maxlen=NUM_LINES)
        self._num_told = 0
        self._latest = b""
        self._lock = threading.Lock()
        self._write()

    def tell(self, decision: Decision, target: int) -> threading.Thread:
        """The number of replicas changes from `target`. The thread is the one that writes."""
        direction = "up" if decision.replicas > target else "down"
        self._num_told += 1
        self._counts[direction, decision.cause] += 1
        line = {"n": self._num_told, "time_unix_s": round(self._wall_clock(), 3), "text": decision.reason, "direction": direction}
        self._lines.append(line | {"cause": decision.cause, "replicas": decision.replicas})
        return self._write()

    def _write(self) -> threading.Thread:
        self._latest = Board(self._origin, dict(self._counts), tuple(self._lines)).as_bytes()
        thread = threading.Thread(target=self._put, name=f"scaling-board-{self._role}", daemon=True)
        thread.start()
        return thread

    def _put(self) -> None:
        """The newest, whichever thread comes first."""
        try:
            with self._lock:
                self._store.put(self._key, self._latest)
        except Exception as error:  # whatever the store raises, scaling goes on
            logger.warning("the scaling of %s cannot be told: %s", self._role, error)


class BoardReader:
    """The Coordinator's eyes. Changes older than `since_unix_s` are no news: an earlier Coordinator told them."""

    def __init__(self, application: str, roles: tuple[str, ...], store: KeyValues, since_unix_s: float) -> None:
        self._keys = {role: board_key(application, role) for role in roles}
        self._store = store
        self._since_unix_s = since_unix_s
        self._seen: dict[str, int] = {}

    def read(self) -> dict[str, Board]:
        """The boards by role. Blocks; what cannot be read is left out."""
        boards = {}
        for role, key in self._keys.items():
            try:
                value = self._store.get(key)
                if value is not None:
                    boards[role] = Board.from_bytes(value)
            except Exception as error:  # Ray's head may be restarting, and nothing depends on this
                logger.debug("the scaling of %s cannot be read: %s", role, error)
        return boards

    def news(self, board: Board) -> list[dict[str, Any]]:
        """The lines that were not here at the last look."""
        seen = self._seen.get(board.origin, 0)
        lines = [line for line in board.lines if line["n"] > seen and line["time_unix_s"] >= self._since_unix_s]
        self._seen[board.origin] = max([seen, *(line["n"] for line in board.lines)])
        return lines
