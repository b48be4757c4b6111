"""`/metrics` by HTTP, and by a Coordinator's replica that members report to."""

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.exchange import GatewayReport
from cluster.api.control import ClusterControl
from cluster.api.errors import CoordinatorAway
from cluster.autoscaling import Decision, History
from cluster.config import MetricsSettings, StateStoreSettings
from cluster.coordinator_limits import CoordinatorLimits
from cluster.coordinator_replica import SCALING_ROLES, CoordinatorReplica, CoordinatorSetup
from cluster.metrics.request_metrics import RequestMetrics
from cluster.scaling_board import BoardReader, BoardWriter
from model.logical_expert import LogicalExpert
from router.placement_map import HostKey
from tests.cluster_unit.front_door import http_client, make_service, says
from tests.cluster_unit.made_up_members import Host, Router

EXPERTS = [LogicalExpert(1, expert) for expert in range(4)]


def replica(per_expert: int) -> CoordinatorReplica:
    limits = CoordinatorLimits(num_hosts=2, num_routers=1, lease_s=60.0)
    return CoordinatorReplica(CoordinatorSetup("app", EXPERTS, limits, StateStoreSettings(), 0.0, MetricsSettings(per_expert=per_expert)))


@pytest.mark.parametrize("per_expert", [0, 4])
async def test_members_report_and_any_gateway_shows_all_of_it(per_expert):
    coordinator = replica(per_expert)
    hosts, router = [Host("a"), Host("b")], Router()
    for _ in range(6):
        for host in hosts:
            report = host.make_report()
            host.obey(await coordinator.exchange_host(report))
        router.duties.obey(await coordinator.exchange_router(router.make_report(sums={("router_steps_total",): 7.0})))
        router.adopt()
    metrics = RequestMetrics()
    metrics.arrived()
    await coordinator.registry(GatewayReport(HostKey("g", 1), metrics.sums(), {"num_open": 1.0}))
    service, _ = make_service(None, says([5]))
    async with asyncio.timeout(20), http_client(service, control=ClusterControl(coordinator)) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families["shoal_requests"].samples[0].value == 1
    assert families["shoal_router_steps"].samples[0].value == 7
    assert len(families["shoal_placement_map_version"].samples) == 1
    assert ("shoal_expert_tokens" in families) == (per_expert == 4)
    assert families["shoal_layer_experts"].samples[0].value == 4


async def test_what_the_autoscaling_policies_did_is_a_decision_and_a_sum():
    class Boards:
        def __init__(self):
            self.values = {}

        def put(self, key, value):
            self.values[key] = value

        def get(self, key):
            return self.values.get(key)

    started = time.time()
    boards = Boards()
    writer = BoardWriter("app", "expert_host", boards, lambda: started + 1)
    writer.tell(Decision(4, 4, None, "busy 0.9 of 0.6 needs 3.10: 2 -> 4", History(), "busy"), 2).join()
    limits = CoordinatorLimits(num_hosts=2, num_routers=1, lease_s=60.0)
    coordinator = CoordinatorReplica(CoordinatorSetup("app", EXPERTS, limits, StateStoreSettings(), 0.0, scales=True))
    coordinator._boards = BoardReader("app", SCALING_ROLES, boards, started)
    async with asyncio.timeout(20):
        while not (told := [line for line in (await coordinator.view())["decisions"] if line["kind"] == "scaling"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [(line["role"], line["direction"], line["cause"], line["replicas"]) for line in told] == [("expert_host", "up", "busy", 4)]
    text = (await coordinator.metrics()).decode()
    assert 'shoal_scaling_decisions_total{direction="up",model_name="app",reason="busy",role="expert_host"} 1.0' in text


async def test_a_coordinator_that_is_away_is_a_failed_scrape_and_not_sums_that_begin_again():
    class Away:
        async def metrics(self):
            raise CoordinatorAway("The coordinator does not answer.")

    service, _ = make_service(None, says([5]))
    async with http_client(service, control=ClusterControl(Away())) as client:
        assert (await client.get("/metrics")).status_code == 503
