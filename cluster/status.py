"""`shoal status`: the cluster on one screen."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_status(view: dict[str, Any], console: Console) -> None:
    """Hosts, routers and the map's version, as tables."""
    console.print(_table("expert hosts", view["hosts"], ("id", "node_id", "ready", "desired", "published", "num_tokens", "busy_s")))
    console.print(_table("routers", view["load"]["routers"], ("id", "node_id", "map_version", "num_running", "num_waiting", "kv_use")))
    version = view["placement"]["version"]
    console.print("no map published yet" if version is None else f"placement map {version[0]}.{version[1]}")


def _table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, str) and len(value) > 12:
        return value[:12]
    return "" if value is None else str(value)
