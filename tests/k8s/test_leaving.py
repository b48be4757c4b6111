"""`shoal leave-node` over made-up processes and a made-up clock; one test looks at the real /proc."""

import os
import re
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import pytest
from typer.testing import CliRunner

from cluster import cli, leaving
from cluster.leaving import HEAD_GONE_S, RETRY_S, NodeNotLeft, Surroundings, ask_ray, choose_node, head_listens, leave_node
from cluster.local_nodes import LocalNode, Process, nodes_of, read_processes, served_on

NODE = LocalNode("a" * 56, "10.0.0.7", "10.0.0.1:6379", raylet_pid=20, is_head=False)


def raylet(pid: int, node_id: str, head: bool = False) -> Process:
    resources = "CPU,2,node:__internal_head__,1.0" if head else "CPU,2"
    flags = (f"--node_id={node_id}", "--node_ip_address=10.0.0.7", f"--static_resource_list={resources}", "--gcs-address=10.0.0.1:6379")
    worker = "--python_worker_command=python worker.py --gcs-address=elsewhere:1 --node_id=of-no-interest"
    return Process(pid, 1, ("/opt/ray/raylet", *flags, worker))


def replica(pid: int, deployment: str, parent: int = 20) -> Process:
    return Process(pid, parent, (f"ray::ServeReplica:my-app.v1:{deployment}",))


@dataclass
class World:
    """Processes that change with time: `at` maps a second to what runs from then on."""

    at: dict[float, list[Process]]
    answer: Callable[[float], Exception | None] = lambda now: None
    is_head_there: Callable[[float], bool] = lambda now: True
    now: float = 100.0
    asked: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def processes(self) -> list[Process]:
        return self.at[max(since for since in self.at if since <= self.now - 100)]

    def drain(self, node: LocalNode, left_s: float) -> Future:
        assert node == NODE
        self.asked.append(left_s)
        outcome: Future = Future()
        error = self.answer(self.now - 100)
        if error is None:
            outcome.set_result(None)
        else:
            outcome.set_exception(error)
        return outcome

    def rest(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def leave(self, timeout_s: float = 30.0, node_id: str | None = None) -> float:
        """The seconds that it took."""
        started = self.now
        around = Surroundings(self.processes, self.drain, lambda: self.now, self.rest, lambda node: self.is_head_there(self.now - 100))
        leave_node(timeout_s, node_id, around, self.said.append)
        return self.now - started


OURS = raylet(20, NODE.node_id)


def test_waits_until_the_last_replica_and_the_proxy_have_gone():
    host, router, proxy = replica(21, "ExpertHost"), replica(22, "Router"), Process(23, 20, ("ray::ProxyActor.ready",))
    elsewhere = [raylet(50, "b" * 56), replica(51, "ExpertHost", parent=50)]
    world = World({0: [OURS, host, router, proxy, *elsewhere], 5: [OURS, router, proxy, *elsewhere], 9: [OURS, proxy], 12: [OURS]})
    assert world.leave(node_id=NODE.node_id) == pytest.approx(12, abs=0.5)
    assert world.asked == [30.0]
    assert world.said[0] == "leaving node aaaaaaaaaaaa (10.0.0.7) within 30 s; on it: 1 ExpertHost, 1 Router, 1 proxy"
    assert [line.partition(": ")[2] for line in world.said[2:-1]] == ["1 Router, 1 proxy", "1 proxy", "nothing"]
    assert world.said[-1].startswith("nothing is left on the node after 12")


def test_a_node_without_replicas_is_drained_all_the_same_and_left_within_moments():
    world = World({0: [OURS]})
    assert world.leave() < 2
    assert world.asked == [30.0]


def test_what_was_on_its_way_when_ray_was_asked_is_waited_for():
    world = World({0: [OURS], 0.7: [OURS, replica(21, "Router")], 6: [OURS]})
    assert world.leave() >= 6


def test_a_node_that_ray_ends_has_been_left():
    world = World({0: [OURS, replica(21, "Router")], 4: []})
    assert world.leave() == pytest.approx(4, abs=0.5)
    assert "Ray has ended the node" in world.said[-1]


def test_when_the_time_is_over_it_says_what_is_left():
    world = World({0: [OURS, replica(21, "Router")]})
    with pytest.raises(NodeNotLeft, match=r"after 30 s there is still on the node: 1 Router$"):
        world.leave()
    assert world.now - 100 <= 30.5


def test_a_head_that_is_away_is_asked_again():
    world = World({0: [OURS, replica(21, "Router")], 20: [OURS]}, answer=lambda now: RuntimeError("no answer") if now < 8 else None)
    assert world.leave() == pytest.approx(20, abs=0.5)
    assert len(world.asked) == 3
    assert world.asked[-1] == pytest.approx(20, abs=1)  # the deadline stays where it was
    assert len([line for line in world.said if "no answer" in line]) == 1


def test_a_head_that_stays_away_is_named_at_the_end():
    world = World({0: [OURS, replica(21, "Router")]}, answer=lambda now: RuntimeError("no answer"))
    with pytest.raises(NodeNotLeft, match="Ray's head did not take the request"):
        world.leave()


@pytest.mark.parametrize("taken", [True, False])
def test_a_head_that_has_gone_with_its_cluster_is_not_waited_for_to_the_end(taken):
    error = None if taken else RuntimeError("no answer")
    world = World({0: [OURS, replica(21, "Router")]}, answer=lambda now: error, is_head_there=lambda now: now < 60)
    with pytest.raises(NodeNotLeft, match=r"head at 10\.0\.0\.1:6379 has been away for 12\d s.*: 1 Router$"):
        world.leave(540)
    assert 55 + HEAD_GONE_S <= world.now - 100 <= 60 + HEAD_GONE_S + RETRY_S


def test_a_head_that_comes_back_in_time_is_waited_for():
    world = World({0: [OURS, replica(21, "Router")], 300: [OURS]}, is_head_there=lambda now: now < 20 or 120 < now < 150 or now > 250)
    assert world.leave(540) == pytest.approx(300, abs=0.5)


def test_a_head_listens_or_does_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = replace(NODE, gcs_address=f"127.0.0.1:{server.getsockname()[1]}")
        assert head_listens(node)
    assert not head_listens(node)
    assert not head_listens(replace(NODE, gcs_address="shoal-head-svc.invalid:6379"))


@pytest.mark.parametrize("processes", [[], [Process(1, 0, ("sleep", "3"))], [raylet(20, NODE.node_id, head=True), replica(21, "Router")]])
def test_where_nothing_is_to_be_done_nobody_is_asked(processes):
    world = World({0: processes})
    assert world.leave() == 0
    assert world.asked == []
    assert len(world.said) == 1


def test_several_nodes_on_one_machine_need_a_name():
    nodes = nodes_of([OURS, raylet(50, "b" * 56)])
    with pytest.raises(NodeNotLeft, match="--node-id"):
        choose_node(nodes, None)
    chosen = choose_node(nodes, "b" * 56)
    assert chosen is not None
    assert chosen.raylet_pid == 50
    assert choose_node(nodes, "c" * 56) is None


def test_a_raylet_tells_its_node_and_not_its_workers_flags():
    assert nodes_of([OURS, Process(3, 1, ()), Process(4, 1, ("/opt/ray/gcs_server", "--node_id=x"))]) == [NODE]


def test_replicas_count_by_deployment_whatever_they_run_now():
    titles = ("ray::ServeReplica:my-app.v1:ExpertHost", "ray::ServeReplica:my-app.v1:ExpertHost.initialize_and_get_metadata")
    processes = [Process(30 + number, 20, (title,)) for number, title in enumerate((*titles, "ray::HAProxyManager", "ray::IDLE", "python"))]
    assert served_on(NODE, processes) == {"ExpertHost": 2, "proxy": 1}


def test_the_real_proc_shows_this_process():
    ours = next(process for process in read_processes() if process.pid == os.getpid())
    assert ours.parent == os.getppid()
    assert any("py" in word for word in ours.arguments)


def test_the_command_passes_on_its_flags_and_prints_every_line(monkeypatch):
    calls = []

    def leave(timeout_s, node_id, around, say):
        calls.append((timeout_s, node_id, around.drain))
        say("a line")

    monkeypatch.setattr(leaving, "leave_node", leave)
    result = CliRunner().invoke(cli.app, ["leave-node", "--timeout-s", "45"])
    assert (result.exit_code, result.output) == (0, "a line\n")
    assert calls == [(45.0, None, ask_ray)]
    assert re.search(r"^ +leave-node ", CliRunner().invoke(cli.app, ["--help"]).output, re.M)
