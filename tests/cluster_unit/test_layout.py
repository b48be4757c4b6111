import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import doors as doors_module
from cluster.config import read_config
from cluster.doors import GRPC_SERVICES, Doors, check_ports, doors_of
from cluster.errors import ConfigError, StartError
from cluster.layout import Choice, Group, choose_device, first_misfit, groups, shortage

CPUS = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0, "GPU": 1.0}}


def total_of(free):
    names = {name for node in free.values() for name in node}
    return {name: sum(node.get(name, 0) for node in free.values()) for name in names}


def config(**flags):
    return read_config(None, {"model.path": "/m", **{key.replace("__", "."): value for key, value in flags.items()}})


def test_a_dense_model_needs_no_host():
    free = {"a": {"CPU": 0.4, "GPU": 1.0}}
    assert shortage(groups(config(), 0, on_gpu=True), total_of(free), free) is None
    assert "3 GPUs, but Ray has 1" in shortage(groups(config(), 2, on_gpu=True), {"CPU": 8, "GPU": 1}, free)


def test_a_cpu_layout_needs_no_gpu():
    assert shortage(groups(config(), 2, on_gpu=False), {"CPU": 2}, {"a": {"CPU": 2}}) is None


def test_totals_are_named():
    assert "the layout needs 3 GPUs, but Ray has 0:" in shortage(groups(config(), 2, on_gpu=True), {"CPU": 8}, {"a": {"CPU": 8}})
    assert "CPUs, but Ray has 4" in shortage(groups(config(router__replicas=5000), 2, on_gpu=False), {"CPU": 4}, {"a": {"CPU": 4}})
    near = groups(config(router__resources={"near": 1}), 2, on_gpu=False)
    assert "1 of the resource 'near', but Ray has 0" in shortage(near, {"CPU": 8}, {"a": {"CPU": 8}})


def test_what_others_use_is_not_there():
    sentence = shortage(groups(config(), 2, on_gpu=False), {"CPU": 8}, {"a": {"CPU": 0.3}, "b": {"CPU": 0.0}})
    assert "ExpertHost 1 of 2 (0.2 CPU) fits on none of Ray's 2 nodes" in sentence


def test_enough_in_all_but_on_no_one_node():
    wide = Group("Router", "router", 1, {"CPU": 3.0})
    assert "Router 1 of 1 (3 CPU)" in shortage([wide], {"CPU": 4}, CPUS)


def test_bound_replicas_come_first():
    free = {"far": {"GPU": 1.0, "far": 1.0}, "near": {"GPU": 1.0}}
    assert first_misfit([Group("R", "router", 1, {"GPU": 1.0}), Group("H", "expert_host", 1, {"GPU": 1.0, "far": 1.0})], free) is None


def test_tenths_add_up():
    assert first_misfit([Group("R", "router", 10, {"CPU": 0.1})], {"a": {"CPU": 1.0}}) is None
    assert first_misfit([Group("R", "router", 11, {"CPU": 0.1})], {"a": {"CPU": 1.0}}) == (Group("R", "router", 11, {"CPU": 0.1}), 11)


@pytest.mark.parametrize("gpus", [0, 1, 3])
@pytest.mark.parametrize("num_hosts", [0, 2])
def test_auto_takes_gpus_where_there_are_enough(gpus, num_hosts):
    free = {"a": {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {})}
    choice = choose_device(config(), num_hosts, free["a"], free)
    assert choice.device == ("cuda" if gpus > num_hosts else "cpu")
    assert bool(choice.remark) == (0 < gpus <= num_hosts)
    assert choose_device(config(model__device="cpu"), num_hosts, free["a"], free) == Choice("cpu")
    if gpus <= num_hosts:
        with pytest.raises(StartError, match=f"needs {num_hosts + 1} GPUs, but Ray has {gpus}"):
            choose_device(config(model__device="cuda"), num_hosts, free["a"], free)


def test_gpus_that_others_use_are_not_taken():
    choice = choose_device(config(), 2, {"CPU": 4, "GPU": 4}, {"a": {"CPU": 4.0, "GPU": 1.0}})
    assert choice.device == "cpu"
    assert "fits on none" in choice.remark


def test_too_few_cpus_are_no_reason_for_the_cpu():
    for gpus in (1, 4):
        with pytest.raises(StartError, match=r"CPUs, but Ray has 0\.5"):
            choose_device(config(), 2, {"CPU": 0.5, "GPU": gpus}, {"a": {"CPU": 0.5, "GPU": gpus}})


def fits_somehow(needs, nodes):
    """Every assignment of replicas to nodes, tried."""
    return any(
        all(sum(need for need, place in zip(needs, places, strict=True) if place == node) <= nodes[node] for node in range(len(nodes)))
        for places in itertools.product(range(len(nodes)), repeat=len(needs))
    )


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), max_size=2), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_never_says_fits_where_nothing_fits(asked, nodes):
    wanted = [Group(str(n), "router", replicas, {"CPU": cpus}) for n, (replicas, cpus) in enumerate(asked)]
    found = first_misfit(wanted, {str(n): {"CPU": cpus} for n, cpus in enumerate(nodes)})
    if found is None:
        assert fits_somehow([cpus for replicas, cpus in asked for _ in range(replicas)], nodes)


@given(st.integers(0, 6), st.integers(0, 4), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_replicas_of_one_size_are_placed_as_well_as_can_be(replicas, cpus, nodes):
    found = first_misfit([Group("R", "router", replicas, {"CPU": cpus})], {str(n): {"CPU": there} for n, there in enumerate(nodes)})
    places = sum(there // cpus for there in nodes) if cpus else replicas
    assert (found is None) == (places >= replicas)
    if found is not None:
        assert found[1] == places + 1


def test_two_doors_on_one_port_are_refused():
    with pytest.raises(ConfigError, match="both 8000"):
        Doors(http_port=8000, grpc_port=8000)


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_taken_port_is_named_with_its_flag(door):
    with socket.socket() as holder, socket.socket() as other:
        for held in (holder, other):
            held.bind(("127.0.0.1", 0))
        holder.listen()
        taken, free = holder.getsockname()[1], other.getsockname()[1]
        other.close()
        ports = {"http_port": taken, "grpc_port": free} if door == "http" else {"http_port": free, "grpc_port": taken}
        with pytest.raises(StartError, match=f"port {taken} on .* is taken .*--{door}-port"):
            check_ports(Doors(**ports))


def test_a_host_of_another_machine_is_no_taken_port():
    with pytest.raises(StartError, match=r"cannot bind 192\.0\.2\.1 .*--host"):
        doors_module._check_port("192.0.2.1", 1025, "--http-port")


DETAILS = {
    "http_options": {"host": "0.0.0.0", "port": 8123},
    "grpc_options": {"port": 9123, "grpc_servicer_functions": GRPC_SERVICES},
    "proxies": {"n1": {"node_ip": "10.0.0.1"}, "n2": {"node_ip": "10.0.0.2"}},
}


@pytest.mark.parametrize(("node", "ip"), [("n2", "10.0.0.2"), ("elsewhere", "10.0.0.1")])
def test_doors_of_a_running_serve(node, ip):
    assert doors_of(DETAILS, Doors(address="auto"), node) == Doors(ip, 8123, 9123, "auto")


def test_a_serve_without_our_services_is_refused():
    with pytest.raises(StartError, match="without Shoal's gRPC services"):
        doors_of(DETAILS | {"grpc_options": {"port": 9000, "grpc_servicer_functions": []}}, Doors(address="auto"), "n1")


def test_every_role_can_be_bound_to_its_nodes():
    bound = config(
        router__resources={"shoal_router": 1},
        gateway__resources={"shoal_router": 0.001},
        coordinator__resources={"shoal_router": 0.001},
        expert_host__resources={"shoal_expert_host": 1},
    )
    free = {
        "head": {"node:__internal_head__": 1.0},
        "routers": {"CPU": 4.0, "shoal_router": 1.002},
        "experts": {"CPU": 4.0, "shoal_expert_host": 2.0},
    }
    total = {"CPU": 8.0, "shoal_router": 1.002, "shoal_expert_host": 2.0}
    assert choose_device(bound, 2, total, free) == Choice("cpu")
    with pytest.raises(StartError, match=r"needs 1\.002 of the resource 'shoal_router', but Ray has 1"):
        choose_device(bound, 2, {**total, "shoal_router": 1.0}, free)
