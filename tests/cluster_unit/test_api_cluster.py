"""The cluster over HTTP and gRPC: what is shown, and an operator's hands on a real Coordinator."""

import grpc
import httpx
import pytest

from cluster.api.control import ClusterControl, CoordinatorCalls
from cluster.api.errors import CoordinatorAway
from cluster.api.grpc_methods import GrpcMethods
from cluster.api.http import http_app
from cluster.api.proto.shoal.v1 import cluster_pb2
from cluster.coordinator_replica import CoordinatorReplica
from cluster.remote_coordinator import RemoteCoordinator
from tests.cluster_unit.front_door import FakeContext, NearCoordinator, StillCoordinator, http_client, make_service, says
from tests.cluster_unit.running_cluster import EXPERTS, RunningCluster

Code = grpc.StatusCode


class AwayCoordinator(StillCoordinator):
    """Answers nobody."""

    async def _away(self, *arguments):
        raise CoordinatorAway("The coordinator does not answer.")

    view = rebalance = drain = set_scaling = operation = _away


@pytest.fixture
def cluster():
    return RunningCluster()


def client_of(cluster, **options):
    service, _ = make_service(None, says([5]))
    return http_client(service, control=cluster.control(**options))


def methods_of(control):
    service, _ = make_service(None, says([5]))
    return GrpcMethods(service, control)


# -- HTTP


@pytest.mark.parametrize(("path", "kind"), [("/cluster/rebalance", "rebalance"), ("/cluster/hosts/host-a/drain", "drain")])
async def test_an_operation_is_accepted_at_once_and_followed_to_its_end(cluster, path, kind):
    cluster.overload(cluster.hosts[0])
    async with client_of(cluster) as client:
        response = await client.post(path)
        operation = response.json()
        assert (response.status_code, operation["kind"], operation["ended_unix_s"]) == (202, kind, None)
        assert response.headers["location"] == f"/cluster/operations/{operation['id']}"
        assert response.headers["retry-after"] == "1"
        assert (await client.post(path)).json()["id"] == operation["id"], "the same request while one is open is that one"
        states = [operation["state"]]
        while states[-1] in ("pending", "running"):
            assert len(states) < 20, states
            response = await client.get(response.headers.get("location", f"/cluster/operations/{operation['id']}"))
            assert response.status_code == 200
            states.append(response.json()["state"])
        assert states[-1] == "done"
        assert response.json()["ended_unix_s"] > operation["started_unix_s"]
        assert "retry-after" not in response.headers
        status = (await client.get("/cluster/status")).json()
    assert operation["id"] in [known["id"] for known in status["operations"]]
    drained = [host["id"] for host in status["hosts"] if host["is_drained"]]
    assert drained == (["host-a"] if kind == "drain" else [])
    assert cluster.hosts[0].ready == frozenset() or kind != "drain"


async def test_a_drain_without_room_is_rolled_back_with_its_reason():
    cluster = RunningCluster(num_hosts=2)  # 12 slots are left for 16 experts
    async with client_of(cluster) as client:
        operation = (await client.post("/cluster/hosts/host-a/drain")).json()
        operation = (await client.get(f"/cluster/operations/{operation['id']}")).json()
    assert operation["state"] == "rolled_back"
    assert "stays as it is" in operation["detail"]


async def test_bounds_reach_every_member_and_are_shown(cluster):
    async with client_of(cluster) as client:
        as_configured = (await client.get("/cluster/load")).json()["scaling"]
        assert as_configured["expert_host"] == {"min_replicas": 2, "max_replicas": 4, "ceiling": 8, "set_at_run_time": {}}
        assert as_configured["router"]["ceiling"] == 8
        assert set(as_configured) == {"expert_host", "router"}
        response = await client.patch("/cluster/scaling", json={"expert_host": {"min_replicas": 3, "max_replicas": 8}, "router": {}})
        assert response.status_code == 202
        operation = (await client.get(response.headers["location"])).json()
        assert operation["state"] == "done"
        shown = (await client.get("/cluster/status")).json()["scaling"]
        assert shown["router"] == as_configured["router"]
        assert (shown["expert_host"]["min_replicas"], shown["expert_host"]["max_replicas"]) == (3, 8)
        assert {(host.duties.scaling["scaling_min"], host.duties.scaling["scaling_max"]) for host in cluster.hosts} == {(3.0, 8.0)}
        response = await client.patch("/cluster/scaling", json={"expert_host": {}})
        assert (await client.get("/cluster/status")).json()["scaling"] == as_configured


BAD_BOUNDS = [
    ({"host": {"min_replicas": 2}}, "host"),
    ({"expert_host": {"replicas": 2}}, "expert_host.replicas"),
    ({"expert_host": 2}, "expert_host"),
    ({"expert_host": {"min_replicas": "2"}}, "expert_host.min_replicas"),
    ({"expert_host": {"min_replicas": 2.5}}, "expert_host.min_replicas"),
    ({"expert_host": {"max_replicas": 0}}, "expert_host.max_replicas"),
    ({"expert_host": {"max_replicas": 10**30}}, "expert_host.max_replicas"),
    ({"expert_host": {"min_replicas": 4, "max_replicas": 3}}, "expert_host.min_replicas"),
    ({"expert_host": {"min_replicas": 5}}, "expert_host.min_replicas"),  # above the max_replicas of the configuration
    ({"expert_host": {"min_replicas": 1}}, "expert_host.min_replicas"),  # below what never goes away
    ({"expert_host": {"max_replicas": 9}}, "expert_host.max_replicas"),  # above the ceiling
    ({"router": {"max_replicas": 9}}, "router.max_replicas"),
    ({"gateway": {"max_replicas": 2}}, "gateway"),  # does not scale
    ({"router": {"max_replicas": 2}, "expert_host": {"max_replicas": 9}}, "expert_host.max_replicas"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BOUNDS, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD_BOUNDS)])
async def test_bad_bounds_name_the_field_and_change_nothing(cluster, body, field):
    async with client_of(cluster) as client:
        response = await client.patch("/cluster/scaling", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", field)
        assert error["message"].startswith(f"{field}: ")
    assert cluster.coordinator.bounds.by_role == {}
    assert cluster.coordinator.view()["operations"] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"router": null}'])
async def test_bodies_that_say_nothing(cluster, content):
    async with client_of(cluster) as client:
        response = await client.patch("/cluster/scaling", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


async def test_without_the_configuration_bounds_are_taken_as_they_come(cluster):
    async with client_of(cluster, autoscaling=None) as client:
        assert (await client.patch("/cluster/scaling", json={"gateway": {"max_replicas": 100}})).status_code == 202
        assert (await client.patch("/cluster/scaling", json={"gateway": {"min_replicas": 2, "max_replicas": 1}})).status_code == 400
        scaling = (await client.get("/cluster/status")).json()["scaling"]
        assert scaling == {"gateway": {"max_replicas": 100, "set_at_run_time": {"max_replicas": 100}}}


async def test_what_is_not_there_and_what_is_not_done_that_way(cluster):
    async with client_of(cluster) as client:
        for method, path, status, code in (
            ("POST", "/cluster/hosts/host-z/drain", 404, "unknown_host"),
            ("GET", "/cluster/operations/drain-9-9", 404, "unknown_operation"),
            ("GET", "/cluster/nonsense", 404, "not_found"),
            ("GET", "/cluster/rebalance", 405, "method_not_allowed"),
            ("POST", "/cluster/scaling", 405, "method_not_allowed"),
        ):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), path
    assert "host-a, host-b, host-c" in (await client_of(cluster).post("/cluster/hosts/host-z/drain")).json()["error"]["message"]


async def test_a_coordinator_that_is_away_is_503():
    service, _ = make_service(None, says([5]))
    async with http_client(service, control=ClusterControl(AwayCoordinator())) as client:
        for method, path, body in (
            ("POST", "/cluster/rebalance", None),
            ("POST", "/cluster/hosts/host-a/drain", None),
            ("PATCH", "/cluster/scaling", {"router": {"max_replicas": 2}}),
            ("GET", "/cluster/operations/drain-1-1", None),
            ("GET", "/cluster/status", None),
        ):
            response = await client.request(method, path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "coordinator_away"), path
            assert response.headers["retry-after"] == "1"
        assert (await client.post("/v1/completions", json={"model": "tiny", "prompt": [3]})).status_code == 200, "tokens flow on"


async def test_the_parts_show_what_an_operator_asks_for(cluster):
    cluster.coordinator.drain("host-c")
    cluster.rounds(3)
    async with client_of(cluster) as client:
        placement, load, hosts, status, everything = [
            (await client.get(path)).json()
            for path in ("/cluster/placement", "/cluster/load", "/cluster/hosts", "/cluster/status", "/cluster")
        ]
    assert len(hosts) == 3
    assert placement["drained_hosts"] == ["host-c"]
    assert [host["is_drained"] for host in hosts] == [False, False, True]
    assert placement["standalone_experts"] == [list(expert) for expert in EXPERTS]
    assert placement["decisions"][-1]["text"] in [line["text"] for line in everything["decisions"]]
    assert placement["state_store"]["name"] == "memory"
    assert 0 < load["balancedness"] <= 1
    assert len(load["expert_tokens"]["1"]) == 8
    assert "expert_tokens" not in status["load"]
    assert "layers" not in status["placement"]
    assert (status["placement"]["num_replicas"], status["placement"]["num_standalone"]) == (16, 16)
    hottest = status["load"]["hottest"][0]
    assert (hottest["expert"], hottest["share"]) == (7, pytest.approx(8 / 36, abs=1e-3))
    assert set(everything) >= {"placement", "load", "hosts", "routers", "decisions", "operations", "scaling", "state_store"}


async def test_the_location_carries_the_prefix_of_the_application(cluster):
    service, _ = make_service(None, says([5]))
    transport = httpx.ASGITransport(http_app(service, cluster.control(), lambda: True), root_path="/tiny")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/tiny/cluster/rebalance")
    assert response.headers["location"].startswith("/tiny/cluster/operations/rebalance-")


# -- gRPC


async def test_the_same_over_grpc(cluster):
    methods = methods_of(cluster.control())
    cluster.overload(cluster.hosts[0])
    for call, request in ((methods.rebalance, cluster_pb2.RebalanceRequest()), (methods.drain, cluster_pb2.DrainRequest(host_id="host-b"))):
        context = FakeContext()
        operation = await call(request, context)
        assert context.code is None
        assert operation.state in (cluster_pb2.OPERATION_STATE_PENDING, cluster_pb2.OPERATION_STATE_RUNNING)
        assert not operation.HasField("ended_unix_s")
        assert (await call(request, context)).id == operation.id
        for _ in range(20):
            operation = await methods.get_operation(cluster_pb2.GetOperationRequest(id=operation.id), context)
        assert operation.state == cluster_pb2.OPERATION_STATE_DONE
        assert operation.ended_unix_s > operation.started_unix_s
    assert (operation.kind, operation.target) == ("drain", "host-b")
    bounds = cluster_pb2.SetScalingRequest(expert_host=cluster_pb2.RoleBounds(max_replicas=5), router=cluster_pb2.RoleBounds())
    operation = await methods.set_scaling(bounds, FakeContext())
    assert operation.kind == "scaling"
    assert cluster.coordinator.bounds.by_role == {"expert_host": {"max_replicas": 5.0}}


@pytest.mark.parametrize(
    ("name", "request_", "code", "kind", "field"),
    [
        ("drain", cluster_pb2.DrainRequest(host_id="host-z"), Code.NOT_FOUND, "unknown_host", None),
        ("drain", cluster_pb2.DrainRequest(), Code.NOT_FOUND, "unknown_host", None),
        ("get_operation", cluster_pb2.GetOperationRequest(id="x"), Code.NOT_FOUND, "unknown_operation", None),
        ("set_scaling", cluster_pb2.SetScalingRequest(), Code.INVALID_ARGUMENT, "invalid_request", None),
        (
            "set_scaling",
            cluster_pb2.SetScalingRequest(router=cluster_pb2.RoleBounds(min_replicas=0)),
            Code.INVALID_ARGUMENT,
            "invalid_request",
            "router.min_replicas",
        ),
        (
            "set_scaling",
            cluster_pb2.SetScalingRequest(router=cluster_pb2.RoleBounds(max_replicas=9)),
            Code.INVALID_ARGUMENT,
            "invalid_request",
            "router.max_replicas",
        ),
    ],
)
async def test_grpc_errors_are_statuses(cluster, name, request_, code, kind, field):
    context = FakeContext()
    answer = await getattr(methods_of(cluster.control()), name)(request_, context)
    assert (context.code, context.trailing["shoal-error-kind"], context.trailing.get("shoal-error-field")) == (code, kind, field)
    assert answer == cluster_pb2.Operation()


async def test_a_coordinator_that_is_away_is_unavailable():
    methods, context = methods_of(ClusterControl(AwayCoordinator())), FakeContext()
    await methods.rebalance(cluster_pb2.RebalanceRequest(), context)
    assert (context.code, context.trailing["shoal-error-kind"]) == (Code.UNAVAILABLE, "coordinator_away")


def test_the_doubles_speak_as_the_coordinator_does():
    """What ClusterControl calls is there, on the double as on the replica behind the handle."""
    names = [name for name in vars(CoordinatorCalls) if not name.startswith("_")]
    assert len(names) == 6
    for kind in (NearCoordinator, RemoteCoordinator, CoordinatorReplica):
        assert all(callable(getattr(kind, name)) for name in names)
