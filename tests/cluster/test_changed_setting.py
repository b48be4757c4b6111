"""A changed setting, as the operator gives it to a running cluster: Serve replaces every replica, and no request notices."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.config import read_config
from cluster.serve_config import serve_config
from cluster.serving import announce_closing
from tests.cluster.conftest import NEAR, App, Shoals
from tests.cluster.load import Load, ask_all
from tests.tiny_models import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NAME = "declared"
NUM_TOKENS = 24
PROMPTS = [tuple(range(start, start + 6)) for start in range(5, 13)]
TIMEOUT_S = 120.0
SETTINGS = {
    "name": NAME,
    "security": {"insecure": True},
    "router": {"replicas": 2, "resources": NEAR, "drain_timeout_s": 10},
    "expert_host": {"replicas": 2, "resources": NEAR},
    "gateway": {"replicas": 2, "drain_timeout_s": 60},
    "placement.drain_timeout_s": 60,
}


@pytest.fixture
def declare(shoals: Shoals, tmp_path) -> Iterator[Callable[..., App]]:
    """Puts the whole serveConfigV2, as the operator does after every change of it."""
    checkpoint = write_tiny("v2-lite", tmp_path / "v2-lite")
    shown = shoals.app(NAME)

    def put(**changes: Any) -> App:
        config = serve_config(read_config(None, {"model.path": str(checkpoint), **SETTINGS, **changes}))
        (application,) = config["applications"]
        application |= {"route_prefix": f"/{NAME}", "import_path": "tests.cluster.metered_app:build"}
        application["args"]["security"]["secret"] = "the same as long as the Secret is"
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
        return shown

    yield put
    announce_closing(NAME)
    serve.delete(NAME)


def wait_for(what: Callable[[], bool]) -> float:
    """The seconds that it took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < TIMEOUT_S, serve.status().applications
        time.sleep(0.3)
    return time.monotonic() - started


def is_running() -> bool:
    status = serve.status().applications.get(NAME)
    return status is not None and status.status == "RUNNING"


def members(app: App) -> set[str]:
    view = app.view()
    return {member["id"] for role in ("hosts", "routers") for member in view[role]}


def test_every_replica_is_replaced_and_no_request_notices(declare, record_property):
    app = declare()
    wait_for(is_running)
    answers = ask_all(app, PROMPTS, NUM_TOKENS)
    before = members(app)
    assert len(before) == 4
    with Load(app, answers, num_clients=3, num_tokens=NUM_TOKENS) as load:
        wait_for(lambda: load.num_answers >= 6)
        declare(**{"coordinator.operation_timeout_s": 500})
        took_s = wait_for(lambda: is_running() and len(now := members(app)) == 4 and not now & before)
        enough = load.num_answers + 6
        wait_for(lambda: load.num_answers >= enough)
    figures = f"2 routers, 2 hosts and 2 gateways were replaced in {took_s:.1f} s under load ({load.num_answers} answers)"
    print(figures)
    record_property("changed setting", figures)
    assert not load.problems
