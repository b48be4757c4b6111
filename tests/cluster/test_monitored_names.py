"""Every series, label and value that the alerts and the dashboard of k8s/monitoring ask for is in a running Shoal's /metrics."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import App, Shoals
from tests.cluster.load import Load, ask_all
from tests.k8s.monitoring import added_labels, queries
from tests.k8s.promql import Sample
from tests.tiny_models import write_tiny

pytestmark = pytest.mark.cluster

NUM_TOKENS = 8
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def app(shoals: Shoals, tmp_path_factory):
    directory = write_tiny("v2-lite", tmp_path_factory.mktemp("v2-lite"))
    scaling = {"min_replicas": 1, "max_replicas": 2, "reaction_s": 0.5}
    with shoals.running(directory, "monitored", autoscaling__router=scaling) as running:
        yield running


def scraped(app: App) -> list[Sample]:
    families = text_string_to_metric_families(httpx.get(f"{app.http}/metrics", timeout=10).text)
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


def test_every_name_exists(app: App):
    answers = ask_all(app, [(5, 6, 7), (8, 9)], NUM_TOKENS)
    wanted = [(query.place, selector) for query in queries() for selector in query.selectors]
    # A change of scale has a label for its reason: only one that happened has a series.
    httpx.patch(f"{app.http}/cluster/scaling", json={"router": {"min_replicas": 2}}, timeout=10).raise_for_status()
    with Load(app, answers, num_clients=2, num_tokens=NUM_TOKENS) as load:
        until = time.monotonic() + TIMEOUT_S
        while missing := absent(scraped(app), wanted):
            assert time.monotonic() < until, missing
            time.sleep(0.5)
    assert not load.problems
    assert len(wanted) > 60


def absent(samples: list[Sample], wanted: list) -> list[str]:
    return [f"{place}: {selector}" for place, selector in wanted if not selector.is_found(samples, added_labels())]


def test_a_name_that_does_not_exist_is_noticed(app: App):
    samples = scraped(app)
    for name, labels in (("shoal_members", {"model_name", "role"}), ("shoal_host_busy_ratio", {"model_name", "host"})):
        assert {frozenset(told) for of, told in samples if of == name} == {frozenset(labels)}
    place, selector = next((query.place, query.selectors[0]) for query in queries() if query.place == "ShoalNoRouter")
    others = [(name, labels) for name, labels in samples if name != "shoal_members"]
    assert absent(others, [(place, selector)])
    assert absent([("shoal_members", {"role": "router"})], [(place, selector)]), "no label model_name"
    assert not absent(samples, [(place, selector)])
