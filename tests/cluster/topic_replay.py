"""Load that turns from one topic to another: routers that route as the expert traces say, on metered hosts, under closed-loop streams.

The checkpoint is tiny and seeded, its MoE layers every third of the traces' 26: 64 experts each, 6 for each token. The topic is whatever
`turn_to` last wrote beside it; a token of a step follows the trace at a place of its own, as texts that are served together do.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import torch
from ray import serve
from torch import Tensor

from actors.expert_host import ExpertHostReplica
from actors.router import RouterReplica, RouterSetup
from cluster import app as application
from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from cluster.coordinator_replica import CoordinatorReplica
from model.experts import ExpertSlots
from model.gate import Routing
from model.logical_expert import LogicalExpert
from router.dispatch import DistributedExperts
from router.parts import BatchHandle
from tests.cluster.conftest import App
from tests.cluster.metered import MeteredSlots
from tests.fixed_micro_batches import Always
from tests.shared_data import shared_data
from tests.tiny_models import TINY, VOCABULARY, TinySpec, write_tiny

FIRST, SECOND = "law", "translation"
TRACE_LAYERS = slice(0, 26, 3)  # more would make steps, and so the gap between two tokens, mere work of two cores
NUM_LAYERS, NUM_EXPERTS, TOP_K = 9, 64, 6
NUM_HOSTS, SLOTS_PER_LAYER = 4, 80
NUM_STREAMS = 24
DELAY_S = 0.0003  # of one token in one expert: hosts, not Python on the cores that all share, are what a step waits for
ANSWER_TOKENS = range(24, 72)  # of different lengths, so that streams do not all begin at once
CALL_TIMEOUT_S = 120.0
SETTINGS: dict[str, Any] = {
    "expert_host__replicas": NUM_HOSTS,
    # Some room beside what the planner places: exchanges of full hosts go one expert at a time.
    "expert_host__slots": (SLOTS_PER_LAYER + 3) * NUM_LAYERS // NUM_HOSTS,
    "placement__redundancy": SLOTS_PER_LAYER / NUM_EXPERTS - 1,
    "coordinator__exchange_interval_s": 0.5,
    "coordinator__short_window_s": 1.0,
    "coordinator__long_window_s": 10.0,
}
MOVING, STILL = {"placement__rebalance_interval_s": 3.0}, {"placement__rebalance_interval_s": 3600.0}


def write_topic_checkpoint(directory: Path) -> Path:
    """Some megabytes; the first layer is dense, so that layer 1 is the traces' first.

    Without a tokenizer: a stream of random bytes would keep tokens back until they make a character.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1 + NUM_LAYERS}
    experts = {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "n_shared_experts": 1}
    spec = TinySpec("the shape of the expert traces", TINY["v2-lite"].config | sizes | experts, seed=26)
    with mock.patch.dict(TINY, {"topics": spec}):
        write_tiny("topics", directory, storage="bfloat16")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    return directory


def turn_to(checkpoint: Path, topic: str) -> None:
    """From the routers' next step on."""
    partial = checkpoint / ".topic"
    partial.write_text(topic)
    partial.rename(checkpoint / "topic")


def read_trace(topic: str) -> np.ndarray:
    """The experts that each token of a topic chose, [tokens, NUM_LAYERS, TOP_K]."""
    trace: np.ndarray = np.load(shared_data("expert_traces") / f"{topic}.npz")["expert_ids"][:, TRACE_LAYERS]
    return trace


def expert_counts(topic: str) -> np.ndarray:
    """How many of a topic's tokens chose each expert, [NUM_LAYERS, NUM_EXPERTS]."""
    trace = read_trace(topic)
    return np.stack([np.bincount(trace[:, index].ravel(), minlength=NUM_EXPERTS) for index in range(NUM_LAYERS)])


class TopicRows:
    """The rows of a step's tokens in the trace of the topic that is told in a file; a new topic begins at its first rows."""

    def __init__(self, topic_file: Path) -> None:
        self._topic_file = topic_file
        self._traces = {topic: read_trace(topic) for topic in (FIRST, SECOND)}
        self._topic = FIRST
        self._num_steps = 0

    def next_step(self, num_tokens: int) -> np.ndarray:
        """[T, L, K]: token t reads on from the t-th of NUM_STREAMS places."""
        topic = self._topic_file.read_text() if self._topic_file.exists() else FIRST
        if topic != self._topic:
            self._topic, self._num_steps = topic, 0
        trace = self._traces[topic]
        places = np.arange(num_tokens) * (len(trace) // NUM_STREAMS) + self._num_steps
        self._num_steps += 1
        return trace[places % len(trace)]


class TopicExperts(DistributedExperts):
    """Sends every token to the experts of its row, each with the same weight, whatever the gate chose."""

    rows: TopicRows | None = None
    _step = np.zeros((0, NUM_LAYERS, TOP_K), dtype=np.uint8)

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> BatchHandle:
        """As DistributedExperts; layer 1 begins a step."""
        if self.rows is not None:
            if layer == 1:
                self._step = self.rows.next_step(len(hidden))
            chosen = torch.from_numpy(self._step[: len(hidden), layer - 1].astype(np.int64))
            routing = Routing(chosen, torch.full(chosen.shape, 1 / TOP_K))
        return super().dispatch(layer, hidden, routing)


class TopicRouter(RouterReplica):
    """A router like any other, but for where its tokens go."""

    experts_type = TopicExperts

    def __init__(self, setup: RouterSetup, coordinator: Any) -> None:
        super().__init__(setup, coordinator)
        assert isinstance(self._experts, TopicExperts)
        self._experts.rows = TopicRows(Path(setup.model_path) / "topic")
        self._engine._micro_batches = Always(1)  # layer 1 begins a step


class TopicSlots(MeteredSlots):
    """Metered, whatever its real speed."""

    def forward(self, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As ExpertSlots, DELAY_S later for each choice that is held here."""
        time.sleep(DELAY_S * int((expert_ids >= 0).sum()))
        return ExpertSlots.forward(self, layer, hidden, expert_ids, weights)


class TopicExpertHost(ExpertHostReplica):
    """A host like any other, but for its speed."""

    slots_type = TopicSlots


class TopicCoordinator(CoordinatorReplica):
    """A Coordinator like any other, but that it can be told how often to look at the balance."""

    async def look_every(self, interval_s: float) -> None:
        """From now on; the next look is `interval_s` after the last plan."""
        planning = self._coordinator.planning
        planning._limits = replace(planning._limits, rebalance_interval_s=interval_s)

    async def remember(self, shares: dict[LogicalExpert, float]) -> None:
        """Takes all load of late to have been in these shares, which add up to 1."""
        window, now_s = self._coordinator.loads.experts_long, time.monotonic()
        total = sum(window.rates(now_s).values())
        window.restore({expert: total * share for expert, share in shares.items()}, now_s)

    async def place(self, shares: dict[LogicalExpert, float]) -> None:
        """Plans for load in these shares as if hosts held nothing: the same placement every time."""
        await self.remember(shares)
        planning = self._coordinator.planning
        planning.desired = dict.fromkeys(planning.desired, frozenset())
        await self.rebalance()


@contextmanager
def topic_actors() -> Iterator[None]:
    """What is deployed meanwhile has these."""
    replicas = {"RouterReplica": TopicRouter, "ExpertHostReplica": TopicExpertHost, "CoordinatorReplica": TopicCoordinator}
    with mock.patch.multiple(application, **replicas):
        yield


def look_every(app: App, interval_s: float) -> None:
    """Tells the Coordinator, which must be a TopicCoordinator."""
    serve.get_deployment_handle("Coordinator", app.name).look_every.remote(interval_s).result(timeout_s=10)


class Loops:
    """Context manager: NUM_STREAMS clients, each of which streams one answer after another. Errors are kept, and when tokens came."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._stop = threading.Event()
        self._times: list[list[list[float]]] = [[] for _ in range(NUM_STREAMS)]  # of each client, of each answer
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(NUM_STREAMS)]
        self.problems: list[str] = []

    def __enter__(self) -> "Loops":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(CALL_TIMEOUT_S)
            if thread.is_alive():
                self.problems.append("a stream has not ended")

    @property
    def num_tokens(self) -> int:
        """On all streams, so far."""
        return sum(len(times) for answers in self._times for times in list(answers))

    def tokens_per_s(self, since_s: float, until_s: float) -> float:
        """Between the last token before the one moment and the last before the other: a step's tokens come together."""
        moments = np.sort([moment for answers in self._times for times in list(answers) for moment in list(times)])
        first, last = (int(np.searchsorted(moments, edge_s)) - 1 for edge_s in (since_s, until_s))
        return (last - first) / float(moments[last] - moments[first])

    def longest_gap_s(self, since_s: float, until_s: float = float("inf")) -> float:
        """Between two tokens of one answer, the second of which came in this time."""
        pairs = (pair for answers in self._times for times in list(answers) for pair in itertools.pairwise(list(times)))
        return max((later - earlier for earlier, later in pairs if since_s <= later < until_s), default=0.0)

    def take_problems(self) -> tuple[str, ...]:
        """Those since the last call."""
        taken, self.problems = tuple(self.problems), []
        return taken

    def _run(self, number: int) -> None:
        lengths = itertools.cycle(range(ANSWER_TOKENS.start + 3 * number % len(ANSWER_TOKENS), ANSWER_TOKENS.stop, 7))
        with grpc.insecure_channel(self._app.grpc) as channel:
            stub = rpc.InferenceStub(channel)
            while not self._stop.is_set():
                try:
                    self._stream(stub, number, next(lengths))
                except grpc.RpcError as error:
                    self.problems.append(f"{error.code()}: {error.details()}")

    def _stream(self, stub: rpc.InferenceStub, number: int, num_tokens: int) -> None:
        times: list[float] = []
        self._times[number].append(times)
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        prompt = pb.TokenIds(ids=[(5 + 7 * number) % VOCABULARY, (11 + len(self._times[number])) % VOCABULARY])
        request = pb.GenerateRequest(model=self._app.name, token_ids=prompt, sampling=sampling)
        call = stub.Generate(request, timeout=CALL_TIMEOUT_S, metadata=self._app.metadata)
        for delta in call:
            times += [time.monotonic()] * len(delta.token_ids)
            if self._stop.is_set():
                call.cancel()
                return
        if len(times) != num_tokens:
            self.problems.append(f"{len(times)} tokens instead of {num_tokens}")


def shares_of(topic: str) -> dict[LogicalExpert, float]:
    """Of each expert in the load of a topic, as the whole of its trace has it."""
    counts = expert_counts(topic)
    chosen = (counts / counts.sum()).tolist()
    return {LogicalExpert(1 + index, expert): share for index, layer in enumerate(chosen) for expert, share in enumerate(layer) if share}


def remember(app: App, topic: str) -> None:
    """Lets the Coordinator, which must be a TopicCoordinator, know nothing but this topic's load."""
    serve.get_deployment_handle("Coordinator", app.name).remember.remote(shares_of(topic)).result(timeout_s=10)


def place(app: App, topic: str) -> None:
    """Plans for a topic and nothing else, and waits until hosts hold what is planned; the Coordinator must be a TopicCoordinator."""
    serve.get_deployment_handle("Coordinator", app.name).place.remote(shares_of(topic)).result(timeout_s=10)
    wait_until_converged(app)


def wait_until_converged(app: App, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while True:
        view = app.view()
        is_open = any(operation["state"] in ("pending", "running") for operation in view["operations"])
        if not is_open and all(host["ready"] == host["desired"] == host["published"] for host in view["hosts"]):
            return
        assert time.monotonic() < until, view["events"][-20:]
        time.sleep(0.2)


def hottest(topic: str, num: int = 6) -> list[tuple[int, int]]:
    """(layer, expert) of the `num` experts of each layer that most of the topic's tokens choose."""
    orders = np.argsort(-expert_counts(topic), axis=1, kind="stable")[:, :num]
    return [(1 + index, expert) for index, order in enumerate(orders.tolist()) for expert in order]


def num_replicas(view: dict[str, Any], experts: list[tuple[int, int]]) -> int:
    """Of all these experts, in the published map."""
    layers = view["placement"]["layers"]
    return sum(len(layers[str(layer)][str(expert)]) for layer, expert in experts)


@dataclass(frozen=True)
class Replay:
    """One turn from the first topic to the second: seconds, tokens a second, and what was planned and loaded meanwhile."""

    tokens_per_s: float
    longest_gap_s: float
    num_plans: int
    num_moves: int
    moved_bytes: int
    num_maps: int
    more_replicas: int  # of the second topic's hottest experts
    problems: tuple[str, ...]


def replay(app: App, loops: Loops, checkpoint: Path, first_s: float, second_s: float) -> Replay:
    """The first topic goes on for `first_s`, the second follows; errors are those since the last replay."""
    before = app.view()
    started_s = time.monotonic()
    time.sleep(first_s)
    turn_to(checkpoint, SECOND)
    time.sleep(second_s)
    ended_s = time.monotonic()
    after = app.view()
    newest = before["decisions"][-1]["n"]
    decisions = [line for line in after["decisions"] if line["n"] > newest]
    plans = [line for line in decisions if line["kind"] == "plan"]
    return Replay(
        tokens_per_s=loops.tokens_per_s(started_s, ended_s),
        longest_gap_s=loops.longest_gap_s(started_s, ended_s),
        num_plans=len(plans),
        num_moves=sum(line["num_moves"] for line in plans),
        moved_bytes=sum(line["num_bytes"] for line in plans),
        num_maps=after["placement"]["version"][1] - before["placement"]["version"][1],
        more_replicas=num_replicas(after, hottest(SECOND)) - num_replicas(before, hottest(SECOND)),
        problems=loops.take_problems(),
    )
