"""The shared value: read both ways, carried over the wire, compared with its predecessor."""

import json
import pickle

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.logical_expert import LogicalExpert
from router.errors import FrameError
from router.placement_map import Endpoint, HostKey, MapVersion, PlacementMap

TEXT = st.text(max_size=8)
SECONDS = st.floats(0, 1e3)


@st.composite
def maps(draw) -> PlacementMap:
    keys = draw(st.lists(st.builds(HostKey, TEXT, st.integers(0, 2**63 - 1)), min_size=1, max_size=4, unique=True))
    hosts = {key: Endpoint(draw(TEXT), draw(TEXT), draw(TEXT), draw(st.integers(0, 65535)), draw(SECONDS), draw(SECONDS)) for key in keys}
    holders = st.lists(st.sampled_from(keys), max_size=3, unique=True).map(tuple)
    experts = st.builds(LogicalExpert, st.integers(0, 5), st.integers(0, 9))
    version = MapVersion(draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    return PlacementMap(version, hosts, draw(st.dictionaries(experts, holders, max_size=12)))


@given(maps())
def test_the_wire_form_brings_back_the_same_map(placement: PlacementMap):
    wire = placement.to_wire()
    for carried in (msgpack.unpackb(msgpack.packb(wire)), json.loads(json.dumps(wire)), pickle.loads(pickle.dumps(wire))):
        assert PlacementMap.from_wire(carried) == placement
    assert pickle.loads(pickle.dumps(placement)) == placement


@given(maps())
def test_read_the_other_way_round(placement: PlacementMap):
    pairs = {(expert, host) for expert, hosts in placement.expert_to_hosts.items() for host in hosts}
    assert {(expert, host) for host, held in placement.host_to_experts.items() for expert in held} == pairs
    assert placement.host_to_experts.keys() == placement.hosts.keys()


@given(maps(), maps())
def test_uncovers_is_what_one_reaches_and_the_other_does_not(old: PlacementMap, new: PlacementMap):
    uncovered = new.uncovers(old)
    for expert in {*old.expert_to_hosts, *new.expert_to_hosts}:
        assert (expert in uncovered) == (bool(old.expert_to_hosts.get(expert)) and not new.expert_to_hosts.get(expert))
    assert new.is_complete(old.expert_to_hosts) == all(new.expert_to_hosts.get(expert) for expert in old.expert_to_hosts)


def wire_of_one() -> dict:
    key = HostKey("host", 7)
    return PlacementMap(MapVersion(1, 2), {key: Endpoint("n", "u", "127.0.0.1", 80)}, {LogicalExpert(1, 0): (key,)}).to_wire()


@pytest.mark.parametrize(
    "damage",
    [
        {"version": [1]},
        {"version": ["1", 2]},
        {"hosts": []},
        {"hosts": [["host", 7, "n", "u", "127.0.0.1"]]},
        {"hosts": [["host", 7, "n", "u", "127.0.0.1", 80, -1.0, 0.0]]},
        {"hosts": [["host", 7, "n", "u", "127.0.0.1", 80, 0.0, float("nan")]]},
        {"hosts": [[]]},
        {"experts": [[1, 0, [1]]]},
        {"experts": [[1, 0, [-1]]]},
        {"experts": [[1, [0]]]},
        {"experts": None},
    ],
)
def test_a_damaged_map_is_an_error(damage: dict):
    with pytest.raises(FrameError, match="not a placement map"):
        PlacementMap.from_wire({**wire_of_one(), **damage})
    with pytest.raises(FrameError):
        PlacementMap.from_wire({})


def test_versions_are_ordered_by_epoch_then_count():
    assert MapVersion(1, 9) < MapVersion(2, 1) < MapVersion(2, 2)
