"""`shoal status`: the cluster on one screen, from what `/cluster/status` says."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Values = Mapping[str, Any]
NUM_HOTTEST = 5
NUM_DECISIONS = 8
NUM_OVER = 3  # operations that are over, beside all that are under way
UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
BAD, WARN, GOOD, FAINT = "bold red", "yellow", "green", "dim"
STATE_STYLES = {"ready": GOOD, "suspected": BAD, "leaving": WARN, "draining": WARN, "loading": WARN, "drained": FAINT, "empty": FAINT}


def show_status(status: Values, console: Console) -> None:
    """The whole screen, once."""
    console.print(status_screen(status, time.time()), highlight=False)


def status_screen(status: Values, now_unix_s: float) -> Group:
    """Everything that an operator looks at first, the most telling parts on top."""
    parts: list[RenderableType] = [_headline(status), _store(status["state_store"], now_unix_s)]
    if status["failure"]:
        parts.append(Text(f"failure      {status['failure']}", BAD))
    parts += [Text(), _hosts(status["hosts"]), Text(), _routers(status["routers"])]
    for title, rows in (
        ("hottest experts", _hottest(status["load"])),
        ("bounds of scaling", _scaling(status)),
        ("operations", _operations(status["operations"])),
        ("last decisions", _decisions(status["decisions"])),
    ):
        if rows is not None:
            parts += [Text(), Text(title, "bold"), rows]
    return Group(*parts)


def host_state(host: Values) -> str:
    """One word for what a host is going through."""
    if host["suspected"]:
        return "suspected"
    if host["is_leaving"]:
        return "leaving"
    if host["is_drained"]:
        return "draining" if host["ready"] or host["published"] else "drained"
    if host["loading"] or host["ready"] < host["desired"]:
        return "loading"
    return "ready" if host["ready"] else "empty"


def _headline(status: Values) -> Text:
    placement, load = status["placement"], status["load"]
    version = placement["version"]
    text = Text.assemble(("placement    ", FAINT), "no map published yet" if version is None else f"map {version[0]}.{version[1]}")
    text.append(f"   {status['num_experts']} experts, {placement['num_replicas']} replicas")
    if placement["num_standalone"]:
        text.append(f", {placement['num_standalone']} stand alone", WARN)
    text.append("\nbalancedness ", FAINT)
    text.append("no load" if load["balancedness"] is None else f"{load['balancedness']:.2f} of the last {load['short_window_s']:.0f} s")
    if load["planned_balancedness"] is not None:
        text.append(f"   {load['planned_balancedness']:.2f} as planned")
    return text


def _store(store: Values, now_unix_s: float) -> Text:
    text = Text.assemble(("state store  ", FAINT), store["name"])
    if store["is_available"]:
        saved = store["saved_unix_s"]
        text.append("   nothing saved yet" if saved is None else f"   saved {max(0.0, now_unix_s - saved):.0f} s ago")
    else:
        text.append(f"   away: {store['error']}", BAD)
    return text


def _hosts(hosts: Sequence[Values]) -> RenderableType:
    if not hosts:
        return Text.assemble(("expert hosts", "bold"), ("   none", FAINT))
    rows = [
        (
            host["id"],
            _short(host["node_id"]),
            Text(host_state(host), STATE_STYLES[host_state(host)]),
            str(host["ready"]) if host["ready"] == host["desired"] else f"{host['ready']} of {host['desired']}",
            "any" if host["slots"] is None else str(host["slots"]),
            _memory(host["ready"] * host["expert_bytes"]),
            f"{host['busy_share']:.0%}",
            f"{1e3 * host['wait_s']:.1f} ms",
            f"{host['tokens_per_s']:.0f}",
        )
        for host in hosts
    ]
    return _table(("expert hosts", "node", "state", "experts", "slots", "memory", "busy", "wait", "tokens/s"), rows, "lllrrrrrr")


def _routers(routers: Sequence[Values]) -> RenderableType:
    rows = [
        (
            router["id"],
            _short(router["node_id"]),
            "none yet" if router["map_version"] is None else f"map {router['map_version'][1]}",
            f"{router.get('num_running', 0):.0f}",
            f"{router.get('num_waiting', 0):.0f}",
            f"{router.get('kv_use', 0.0):.0%}",
        )
        for router in routers
    ]
    return _table(("routers", "node", "works by", "running", "waiting", "KV cache"), rows, "lllrrr")


def _hottest(load: Values) -> RenderableType | None:
    rows = [
        (
            f"layer {entry['layer']} expert {entry['expert']}",
            f"{entry['share']:.1%}",
            f"{entry['tokens_per_s']:.0f}",
            str(entry["replicas"]),
        )
        for entry in load["hottest"][:NUM_HOTTEST]
    ]
    return _table(("", "share of layer", "tokens/s", "replicas"), rows, "lrrr") if rows else None


def _scaling(status: Values) -> RenderableType | None:
    running = {"expert_host": len(status["hosts"]), "router": len(status["routers"])}
    rows = [
        (
            role.replace("_", "-"),
            str(running.get(role, "")),
            str(bounds.get("min_replicas", "")),
            str(bounds.get("max_replicas", "")),
            str(bounds.get("ceiling", "")),
            "set at run time" if bounds["set_at_run_time"] else "as configured",
        )
        for role, bounds in status["scaling"].items()
    ]
    return _table(("", "running", "min", "max", "ceiling", ""), rows, "lrrrrl") if rows else None


def _operations(operations: Sequence[Values]) -> RenderableType | None:
    is_open = [operation["ended_unix_s"] is None for operation in operations]
    over = [operation for operation, still in zip(operations, is_open, strict=True) if not still][-NUM_OVER:]
    shown = [operation for operation, still in zip(operations, is_open, strict=True) if still or operation in over]
    return _lines((operation["started_unix_s"], operation_line(operation)) for operation in shown) if shown else None


def operation_line(operation: Values) -> Text:
    """An operation's id, state and sentence."""
    style = {"done": GOOD, "rolled_back": BAD}.get(operation["state"], WARN)
    return Text.assemble(operation["id"], " ", (operation["state"].replace("_", " "), style), f": {operation['detail']}")


def _decisions(decisions: Sequence[Values]) -> RenderableType | None:
    """Of maps that were published one after another, as a move goes on, the last."""
    following = [line["kind"] for line in decisions[1:]] + [""]
    told = [line for line, next_kind in zip(decisions, following, strict=False) if (line["kind"], next_kind) != ("publish", "publish")]
    return _lines((line["time_unix_s"], Text(line["text"])) for line in told[-NUM_DECISIONS:]) if told else None


def _lines(lines: Iterable[tuple[float, Text]]) -> Table:
    """Each with the time of day; a long one goes on below its own beginning."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style=FAINT)
    grid.add_column(overflow="fold")
    for time_unix_s, text in lines:
        grid.add_row(time.strftime("%H:%M:%S", time.localtime(time_unix_s)), text)
    return grid


def _table(columns: Sequence[str], rows: Iterable[Sequence[RenderableType]], sides: str) -> Table:
    """`sides` says by l or r to which side each column stands: words to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style=FAINT, padding=(0, 2, 0, 0))
    for column, side in zip(columns, sides, strict=True):
        header = column if table.columns else Text(column, "bold")
        table.add_column(header, justify="right" if side == "r" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _memory(num_bytes: float) -> str:
    unit, scale = next(((unit, scale) for unit, scale in UNITS if num_bytes >= scale), UNITS[-1])
    count = num_bytes / scale
    return f"{count:.0f} {unit}" if count >= 100 or scale == 1 else f"{count:.3g} {unit}"


def _short(name: str) -> str:
    return name[:8]  # Ray's ids of nodes are 56 characters
