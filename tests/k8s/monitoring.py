"""What k8s/monitoring says: its alerts, its dashboard, and the labels that scraping adds."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.k8s.promql import Selector, selectors

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
BY_THE_OPERATOR = frozenset({"namespace", "job"})  # on every target of a PodMonitor


@dataclass(frozen=True)
class Query:
    """One expression, where it stands, and the labels that texts beside it show."""

    place: str
    expression: str
    shown: frozenset[str]

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return tuple(Selector(one.name, one.labels | self.shown, one.matchers) for one in selectors(self.expression))


def alerts() -> list[dict]:
    """The rules as they stand in the file."""
    rule = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def dashboard() -> dict:
    """As Grafana takes it."""
    return json.loads((MONITORING / "dashboard.json").read_text())


def pod_monitors() -> dict[str, dict]:
    """By name."""
    return {monitor["metadata"]["name"]: monitor for monitor in yaml.safe_load_all((MONITORING / "scraping.yaml").read_text())}


def added_labels() -> frozenset[str]:
    """Labels that Shoal's own series get by being scraped."""
    endpoints = pod_monitors()["shoal"]["spec"]["podMetricsEndpoints"]
    return BY_THE_OPERATOR | {rule["targetLabel"] for endpoint in endpoints for rule in endpoint["relabelings"] if "targetLabel" in rule}


def queries() -> list[Query]:
    """All of alerts, panels and the dashboard's menus."""
    of_alerts = [
        Query(alert["alert"], alert["expr"], frozenset(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values()))))
        for alert in alerts()
    ]
    of_panels = [
        Query(f"panel {panel['title']}", target["expr"], frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"])))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    of_menus = [
        Query(f"menu {menu['name']}", *_of_menu(menu["definition"]))
        for menu in dashboard()["templating"]["list"]
        if menu["type"] == "query"
    ]
    return [*of_alerts, *of_panels, *of_menus]


def _of_menu(definition: str) -> tuple[str, frozenset[str]]:
    """label_values(series, label) as the series and its label."""
    series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", definition).groups()
    return series, frozenset({label})
