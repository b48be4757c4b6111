"""The router's loop on a real engine with local experts; gateways are fakes that refuse what no frame could carry."""

import logging
import queue
import threading
import time

import pytest
import torch

from model.experts import Experts
from router import service as service_module
from router import wire
from router.engine import Engine, EngineConfig
from router.errors import ChannelClosed, ChannelFull, FrameError
from router.request import Request, SamplingParams
from router.service import MAX_FAILURES_IN_A_ROW, RouterService
from router.transport.messages import decode_message, encode_message
from tests.reference.local_generation import LocalGenerator
from tests.tiny_models import write_tiny

torch.set_num_threads(1)


class Gateway:
    """Its deltas as they come, through the wire's own coding."""

    def __init__(self, max_bytes=1 << 20):
        self.deltas = queue.SimpleQueue()
        self.hung_up = threading.Event()
        self.max_bytes = max_bytes

    def send(self, message):
        _, payload = encode_message(1, message)
        if len(payload) > self.max_bytes:
            raise FrameError(f"a message of {len(payload)} bytes")
        for delta in wire.deltas_from_wire(decode_message(payload)):
            self.deltas.put(delta)

    def hang_up(self):
        self.hung_up.set()

    def next(self):
        return self.deltas.get(timeout=30)

    def all_of(self, count=1):
        """The deltas of `count` requests, by id."""
        answers = {}
        num_finished = 0
        while num_finished < count:
            delta = self.next()
            answers.setdefault(delta.request_id, []).append(delta)
            num_finished += delta.finish is not None
        return answers


class Gated(Experts):
    """Local experts that a test can hold up inside a step."""

    def __init__(self, experts):
        self.experts = experts
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()

    def dispatch(self, layer, hidden, routing):
        self.entered.release()
        assert self.open.wait(30)
        return self.experts.dispatch(layer, hidden, routing)

    def combine(self, handle):
        return self.experts.combine(handle)

    def abandon(self, handle):
        self.experts.abandon(handle)


class Router:
    def __init__(self, local, latest_map=lambda: None, adopted=None, **sizes):
        self.experts = Gated(local.experts)
        config = EngineConfig(**{"num_pages": 64, "max_model_len": 256, "max_batch_tokens": 128, **sizes})
        self.engine = Engine(local.model, self.experts, config, torch.device("cpu"))
        self.service = RouterService(self.engine, adopted, latest_map)

    def submit(self, gateway, name, max_tokens=4, **sampling):
        self.service.on_message(gateway, carried(wire.submit(make_request(name, max_tokens, **sampling))))

    def hold(self, gateway, name, max_tokens=4):
        """Submits, and holds up the step that it gets into."""
        self.experts.open.clear()
        self.submit(gateway, name, max_tokens)
        assert self.experts.entered.acquire(timeout=30)


def make_request(name, max_tokens=4, **sampling):
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling})
    return Request(request_id=name, prompt_token_ids=(5, 6, 7), sampling=sampling)


def carried(message):
    return decode_message(encode_message(1, message)[1])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return LocalGenerator.load(write_tiny("mixtral", tmp_path_factory.mktemp("mixtral")), num_pages=1)


@pytest.fixture
def start(local):
    routers = []

    def start(**options):
        routers.append(Router(local, **options))
        return routers[-1]

    yield start
    for router in routers:
        router.experts.open.set()
        router.service.close()


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_each_gateway_gets_the_deltas_of_its_own_requests(start):
    router, near, far = start(), Gateway(), Gateway()
    router.submit(near, "a", 4)
    router.submit(near, "b", 3)
    router.submit(far, "c", 4)
    near_answers, far_answers = near.all_of(2), far.all_of()
    assert set(near_answers) == {"a", "b"}
    assert set(far_answers) == {"c"}
    tokens = {name: [t for d in deltas for t in d.token_ids] for name, deltas in (near_answers | far_answers).items()}
    assert len(tokens["a"]) == 4
    assert tokens["a"] == tokens["c"]
    assert tokens["b"] == tokens["a"][:3]
    wait_until(lambda: router.engine.load.kv_use == 0.0)


def test_cancel_frees_and_says_nothing_more(start):
    router, gateway, stranger = start(), Gateway(), Gateway()
    router.submit(gateway, "long", 200)
    gateway.next()
    router.service.on_message(stranger, wire.cancel("long"))  # not its own
    router.submit(stranger, "short", 2)
    stranger.all_of()
    assert router.engine.load.num_running == 1
    router.service.on_message(gateway, wire.cancel("long"))
    wait_until(lambda: router.engine.load.kv_use == 0.0)
    assert router.engine.load.num_running == 0
    while not gateway.deltas.empty():
        assert gateway.next().finish is None


def test_gateway_that_goes_takes_its_requests_with_it_and_no_other(start):
    router, gone, other = start(), Gateway(), Gateway()
    router.hold(gone, "a", 200)
    router.submit(gone, "b", 200)
    router.submit(other, "c", 20)
    router.service.on_close(gone)
    router.experts.open.set()
    assert sum(len(delta.token_ids) for delta in other.all_of()["c"]) == 20
    wait_until(lambda: router.engine.load.kv_use == 0.0)


def test_invalid_request_is_answered_with_its_field(start):
    router, gateway = start(), Gateway()
    router.submit(gateway, "a", 1000)
    failed = gateway.next()
    assert (failed.request_id, failed.finish, failed.failure.kind, failed.failure.field) == ("a", "error", "invalid_request", "max_tokens")
    message = wire.submit(make_request("b"))
    message["submit"]["what"] = 1
    router.service.on_message(gateway, message)
    assert gateway.next().failure.kind == "invalid_request"


def test_full_queue_is_answered_while_a_step_runs(start):
    router, gateway, late = start(max_waiting=2), Gateway(), Gateway()
    router.hold(gateway, "runs")
    for name in ("w1", "w2"):
        router.submit(gateway, name)
    router.submit(late, "too many")
    refused = late.next()
    assert not router.experts.open.is_set()
    assert (refused.request_id, refused.finish, refused.failure.kind) == ("too many", "error", "queue_full")
    assert "2 requests wait" in refused.failure.message
    router.experts.open.set()
    assert set(gateway.all_of(3)) == {"runs", "w1", "w2"}
    router.submit(late, "again")  # what was counted is counted off
    assert late.all_of()["again"][-1].finish == "length"


def test_what_waits_in_engine_and_inbox_is_one_limit(start):
    router, gateway, late = start(max_waiting=2, max_running=1), Gateway(), Gateway()
    router.hold(gateway, "runs", 240)
    router.submit(gateway, "waits")
    router.experts.open.set()
    for _ in range(2):
        gateway.next()  # by the second step the engine has taken in what waits
    router.experts.open.clear()
    router.submit(late, "let in")
    router.submit(late, "too many")
    assert late.next().request_id == "too many"
    router.service.on_message(gateway, wire.cancel("runs"))
    router.experts.open.set()
    assert set(late.all_of()) == {"let in"}


def test_inbox_has_a_limit_past_which_a_gateway_is_cut_off(start, monkeypatch):
    monkeypatch.setattr(service_module, "MAX_INBOX", 3)
    router, gateway = start(), Gateway()
    router.hold(gateway, "a")
    for n in range(3):
        router.service.on_message(gateway, wire.cancel(f"unknown {n}"))
    with pytest.raises(ChannelFull):
        router.service.on_message(gateway, wire.cancel("one more"))


def test_answer_that_no_frame_can_carry_fails_alone(start, caplog):
    router, gateway = start(), Gateway(max_bytes=400)
    router.experts.open.clear()
    router.submit(gateway, "first", 8)
    router.experts.entered.acquire(timeout=30)
    router.submit(gateway, "small", 8)
    router.submit(gateway, "big", 8, prompt_logprobs=20)
    with caplog.at_level(logging.CRITICAL, logger="shoal"):
        router.experts.open.set()
        answers = gateway.all_of(3)
    assert [delta.finish for delta in answers["big"]] == ["error"]
    assert answers["big"][0].failure.kind == "internal"
    assert "bytes" in answers["big"][0].failure.message
    for name in ("first", "small"):
        assert sum(len(delta.token_ids) for delta in answers[name]) == 8
    assert router.service.is_alive
    wait_until(lambda: router.engine.load.kv_use == 0.0)


def test_gateway_that_nothing_can_be_sent_to_does_not_end_the_engine(start, caplog):
    router, deaf, other = start(), Gateway(max_bytes=0), Gateway()
    with caplog.at_level(logging.CRITICAL, logger="shoal"):
        router.submit(deaf, "a", 200)
        router.submit(other, "b")
        other.all_of()
        wait_until(lambda: router.engine.load.kv_use == 0.0)
    assert router.service.is_alive


class Adopting:
    """Fails as often as it is told to."""

    def __init__(self, num_failures):
        self.num_failures = num_failures
        self.num_calls = 0

    def adopt(self, _):
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise RuntimeError("the map cannot be adopted")


def test_loop_that_fails_for_a_while_goes_on(start, caplog):
    router, gateway = start(latest_map=object, adopted=Adopting(MAX_FAILURES_IN_A_ROW - 1)), Gateway()
    router.submit(gateway, "a")
    for _ in range(MAX_FAILURES_IN_A_ROW):
        router.service.wake()
    assert gateway.all_of()["a"][-1].finish == "length"
    assert "cannot be adopted" in caplog.text
    assert router.service.is_alive


def test_loop_that_fails_on_and_on_ends_and_sends_its_gateways_away(start, caplog):
    adopting = Adopting(1000)
    router, gateway = start(latest_map=object, adopted=adopting), Gateway()
    router.submit(gateway, "a")
    for _ in range(MAX_FAILURES_IN_A_ROW):
        router.service.wake()
    wait_until(lambda: not router.service.is_alive)
    assert adopting.num_calls == MAX_FAILURES_IN_A_ROW
    assert gateway.hung_up.is_set()
    assert caplog.text.count("engine's loop failed") == MAX_FAILURES_IN_A_ROW
    with pytest.raises(ChannelClosed):
        router.submit(gateway, "b")
