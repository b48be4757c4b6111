"""`shoal drain`, `shoal rebalance`, `shoal scale`: an operation asked for over HTTP and followed to its end, a line per change."""

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from cluster.client import Refused, ask_json
from cluster.errors import RequestFailed
from cluster.status import operation_line

POLL_S = 0.5
AWAY_S = 60.0  # how long a Coordinator that restarts is waited for
OPEN_STATES = ("pending", "running")
Operation = dict[str, Any]
Rest = Callable[[float], None]


def ask_rebalance(url: str) -> Operation:
    """Raises RequestFailed."""
    operation: Operation = ask_json(f"{url}/cluster/rebalance", {})
    return operation


def ask_drain(url: str, host_id: str) -> Operation:
    """Raises RequestFailed."""
    operation: Operation = ask_json(f"{url}/cluster/hosts/{quote(host_id, safe='')}/drain", {})
    return operation


def ask_scaling(url: str, role: str, min_replicas: int | None, max_replicas: int | None) -> Operation:
    """None is what is configured. Raises RequestFailed."""
    given = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    operation: Operation = ask_json(f"{url}/cluster/scaling", {role: bounds}, "PATCH")
    return operation


def changes(url: str, operation: Operation, rest: Rest = time.sleep) -> Iterator[Operation]:
    """The operation as it is, and again whenever its state or its sentence has changed, to its end.

    Raises RequestFailed if the Coordinator has forgotten it, or stays away for AWAY_S.
    """
    place = f"{url}/cluster/operations/{quote(operation['id'], safe='')}"
    yield operation
    away_s = 0.0
    while operation["state"] in OPEN_STATES:
        rest(POLL_S)
        try:
            now: Operation = ask_json(place)
        except Refused as error:
            away_s += POLL_S
            if error.status != 503 or away_s >= AWAY_S:
                raise
            continue
        away_s = 0.0
        if now != operation:
            operation = now
            yield operation


def follow(url: str, operation: Operation, console: Console, rest: Rest = time.sleep) -> bool:
    """Shows a line per change; whether it was done. After Ctrl-C the operation goes on, and RequestFailed says where to look."""
    last = operation
    try:
        for last in changes(url, operation, rest):
            line = Text.assemble((time.strftime("%H:%M:%S"), "dim"), " ", operation_line(last))
            console.print(line, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        raise RequestFailed(f"no longer watched, but {operation['id']} goes on: see `shoal status`") from None
    return bool(last["state"] == "done")
