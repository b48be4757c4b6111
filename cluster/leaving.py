"""`shoal leave-node`: what a pod runs before it ends. Ray drains its node, so Serve moves what runs there, and we wait until it has."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.local_nodes import LocalNode, Process, nodes_of, served_on

POLL_S = 0.25
# A replica that was on its way here when Ray was asked has appeared by then; later ones Ray sends elsewhere.
SETTLE_S = 1.0
RETRY_S = 5.0
CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 2.0
# A head that is started anew is back by then; where the whole cluster is deleted it never is.
HEAD_GONE_S = 120.0


class NodeNotLeft(ClusterError):
    """What is still on the node, or which node is meant."""

    kind = "node_not_left"


Say = Callable[[str], None]
Drain = Callable[[LocalNode, float], "Future[None]"]


def head_listens(node: LocalNode) -> bool:
    """Whether anybody takes connections where the node's head is or was."""
    host, _, port = node.gcs_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Surroundings:
    """What leaving needs of the world: `drain` asks Ray with the seconds that are left, `clock` and `rest` are a clock's."""

    processes: Callable[[], Iterable[Process]]
    drain: Drain
    clock: Callable[[], float] = time.monotonic
    rest: Callable[[float], None] = time.sleep
    is_head_there: Callable[[LocalNode], bool] = head_listens


def leave_node(timeout_s: float, node_id: str | None, around: Surroundings, say: Say) -> None:
    """A line to `say` per event. Returns when nothing of Serve's is left on the node, at once where nothing is to be done.

    Serve replaces a replica before it stops it as long as `timeout_s` leaves that replica its own time to stop, and stops it at
    once otherwise. Raises NodeNotLeft when the time is over, if several nodes run here and none is named, or once Ray's head has been
    away for HEAD_GONE_S: the cluster is being deleted, and nothing will take over what is here. Streams that run here have that long
    to end; nothing here knows of them, so it is that long without any too.
    """
    node = choose_node(nodes_of(around.processes()), node_id)
    if node is None:
        say("no Ray node runs here: nothing to leave")
    elif node.is_head:
        say(f"node {_short(node)} is Ray's head, which no other node replaces: nothing is moved")
    else:
        _Leaving(node, timeout_s, around, say).run()


def choose_node(nodes: list[LocalNode], node_id: str | None) -> LocalNode | None:
    """The one that is named, else the only one. Raises NodeNotLeft where there are several."""
    if node_id is not None:
        return next((node for node in nodes if node.node_id == node_id), None)
    if len(nodes) > 1:
        raise NodeNotLeft(f"{len(nodes)} Ray nodes run here: name one with --node-id: {', '.join(node.node_id for node in nodes)}")
    return nodes[0] if nodes else None


class _Leaving:
    """One node's departure, from the request to the last replica."""

    def __init__(self, node: LocalNode, timeout_s: float, around: Surroundings, say: Say) -> None:
        self._node = node
        self._around = around
        self._say = say
        self._started_s = around.clock()
        self._until_s = self._started_s + timeout_s
        self._request: Future[None] | None = None
        self._asked_s = 0.0
        self._accepted_s: float | None = None
        self._last: Counter[str] | None = None
        self._complained = False
        self._looked_s = self._head_seen_s = self._started_s

    def run(self) -> None:
        around = self._around
        while True:
            processes = list(around.processes())
            if all(process.pid != self._node.raylet_pid for process in processes):
                self._say(f"Ray has ended the node after {self._passed_s():.1f} s: nothing was left on it")
                return
            left = served_on(self._node, processes)
            self._tell(left)
            self._ask()
            if not left and self._accepted_s is not None and around.clock() >= self._accepted_s + SETTLE_S:
                self._say(f"nothing is left on the node after {self._passed_s():.1f} s")
                return
            if around.clock() >= self._until_s:
                why = "" if self._accepted_s is not None else ", and Ray's head did not take the request to drain it"
                raise NodeNotLeft(f"after {self._passed_s():.0f} s there is still on the node: {_text(left)}{why}")
            self._look_for_head(left)
            around.rest(POLL_S)

    def _tell(self, left: Counter[str]) -> None:
        if self._last is None:
            left_s = self._until_s - self._around.clock()
            self._say(f"leaving node {_short(self._node)} ({self._node.ip}) within {left_s:.0f} s; on it: {_text(left)}")
        elif left != self._last:
            self._say(f"after {self._passed_s():.1f} s there is left on the node: {_text(left)}")
        self._last = left

    def _ask(self) -> None:
        """Until Ray has taken the request; a head that restarts is asked again."""
        now = self._around.clock()
        if self._accepted_s is not None:
            return
        if self._request is None:
            if not self._asked_s or now >= self._asked_s + RETRY_S:
                self._asked_s = now
                self._request = self._around.drain(self._node, self._until_s - now)
        elif self._request.done():
            error, self._request = self._request.exception(), None
            if error is None:
                self._accepted_s = now
                self._say("Ray drains the node: Serve starts nothing on it, and moves what is there")
            elif not self._complained:
                self._complained = True
                self._say(f"Ray's head at {self._node.gcs_address} does not take the request, asking again: {error}")

    def _look_for_head(self, left: Counter[str]) -> None:
        """NodeNotLeft once it has been away for HEAD_GONE_S."""
        now = self._around.clock()
        if now < self._looked_s + RETRY_S:
            return
        self._looked_s = now
        if self._around.is_head_there(self._node):
            self._head_seen_s = now
        elif now >= self._head_seen_s + HEAD_GONE_S:
            gone = f"Ray's head at {self._node.gcs_address} has been away for {now - self._head_seen_s:.0f} s"
            raise NodeNotLeft(f"{gone}, so nothing is taken over; still on the node: {_text(left)}")

    def _passed_s(self) -> float:
        return self._around.clock() - self._started_s


def ask_ray(node: LocalNode, left_s: float) -> "Future[None]":
    """Asks the head to drain the node, from a thread: where no head answers Ray's client blocks for 40 s."""
    outcome: Future[None] = Future()
    threading.Thread(target=_request_drain, args=(node, left_s, outcome), daemon=True).start()
    return outcome


def _request_drain(node: LocalNode, left_s: float, outcome: "Future[None]") -> None:
    # What `ray drain-node` does; that needs a connected driver, whose start takes seconds of the grace period.
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]  # generated, likewise

    deadline_ms = int(1000 * (time.time() + left_s))
    try:
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # the one reason that no raylet refuses
        client = GcsClient(address=node.gcs_address)
        is_accepted, why = client.drain_node(node.node_id, reason, "shoal leave-node", deadline_ms, timeout=CALL_TIMEOUT_S)
        if not is_accepted:
            raise NodeNotLeft(why)
    except Exception as error:  # whatever Ray raises, the loop that asked says it
        outcome.set_exception(error)
    else:
        outcome.set_result(None)


def _short(node: LocalNode) -> str:
    return node.node_id[:12]


def _text(names: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(names.items())) or "nothing"
