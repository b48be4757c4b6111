"""What the autoscaling policies did, on its way from Serve's controller to the Coordinator."""

import pytest

from cluster.autoscaling import Bounds, Decision, Fleet, History, Pace, Signal, decide
from cluster.scaling_board import Board, BoardReader, BoardWriter, board_key


class Memory:
    def __init__(self):
        self.values = {}

    def put(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values.get(key)


class Away:
    def put(self, key, value):
        raise ConnectionError("the head is away")

    def get(self, key):
        raise ConnectionError("the head is away")


def decision(replicas, cause="busy"):
    return Decision(replicas, replicas, None, f"because: -> {replicas}", History(), cause)


def test_changes_are_told_once_and_counted_by_direction_and_cause():
    store = Memory()
    writer = BoardWriter("app", "expert_host", store, lambda: 50.0)
    reader = BoardReader("app", ("router", "expert_host"), store, since_unix_s=0.0)
    writer.tell(decision(4), 2).join()
    writer.tell(decision(3, "queue_wait"), 4).join()
    board = reader.read()["expert_host"]
    assert board.counts == {("up", "busy"): 1, ("down", "queue_wait"): 1}
    assert [(line["text"], line["replicas"]) for line in reader.news(board)] == [("because: -> 4", 4), ("because: -> 3", 3)]
    assert reader.news(board) == []
    writer.tell(decision(5), 3).join()
    assert [line["replicas"] for line in reader.news(reader.read()["expert_host"])] == [5]
    assert "router" not in reader.read()


def test_a_new_coordinator_does_not_tell_what_an_earlier_one_told_but_has_its_sums():
    store, now = Memory(), [50.0]
    writer = BoardWriter("app", "router", store, lambda: now[0])
    writer.tell(decision(2), 1).join()
    now[0] = 70.0
    later = BoardReader("app", ("router",), store, since_unix_s=60.0)
    assert later.news(later.read()["router"]) == []
    assert later.read()["router"].counts == {("up", "busy"): 1}
    writer.tell(decision(3), 2).join()
    assert len(later.news(later.read()["router"])) == 1


def test_a_policy_begins_with_an_empty_board_of_its_own_life():
    store = Memory()
    BoardWriter("app", "router", store).tell(decision(2), 1).join()
    first = Board.from_bytes(store.values[board_key("app", "router")])
    writer = BoardWriter("app", "router", store)
    writer.tell(decision(2), 3).join()
    second = Board.from_bytes(store.values[board_key("app", "router")])
    assert second.origin != first.origin
    assert second.counts == {("down", "busy"): 1}


def test_a_store_that_is_away_or_damaged_stops_nobody():
    BoardWriter("app", "router", Away()).tell(decision(2), 1).join()
    assert BoardReader("app", ("router",), Away(), 0.0).read() == {}
    store = Memory()
    store.put(board_key("app", "router"), b"{}")
    assert BoardReader("app", ("router",), store, 0.0).read() == {}


@pytest.mark.parametrize(
    ("need", "target", "bounds", "cause"),
    [
        (3.0, 2, Bounds(1, 8), "queue_wait"),
        (20.0, 2, Bounds(1, 8), "max_replicas"),
        (0.0, 1, Bounds(2, 8), "min_replicas"),
        (0.0, 2, Bounds(1, 8, floor=5), "floor"),
    ],
)
def test_the_cause_of_a_number(need, target, bounds, cause):
    pace = Pace(reaction_s=0.0, cooldown_s=60.0)
    made = decide([Signal("queue wait", need, "")], Fleet(target, target, target), bounds, pace, History(), 100.0)
    assert made.cause == cause
    assert made.replicas != target
