"""Constrained requests through the router's loop: what compiles beside it never holds it up."""

import queue
import threading

import pytest

from model.tokenizer import Tokenizer
from router import wire
from router.errors import InvalidRequest
from router.service import RouterService
from tests.reference.local_generation import LocalGenerator
from tests.router.constrained import choice, make_engine, make_grammars, make_request, regex, tokens_of
from tests.tiny_models import write_tiny


class Gateway:
    def __init__(self):
        self.deltas = queue.SimpleQueue()

    def send(self, message):
        for delta in wire.deltas_from_wire(message):
            self.deltas.put(delta)

    def hang_up(self):
        pass

    def answer(self):
        """Deltas up to the next finish."""
        deltas = [self.deltas.get(timeout=30)]
        while deltas[-1].finish is None:
            deltas.append(self.deltas.get(timeout=30))
        return deltas


class HeldGrammars:
    """Compiles "held" only once it may, and breaks over "broken"."""

    def __init__(self, grammars):
        self.grammars = grammars
        self.entered = threading.Semaphore(0)
        self.may_go = threading.Event()

    def matcher(self, request):
        value = request.sampling.constraint.value
        if value == "held":
            self.entered.release()
            assert self.may_go.wait(30)
        if value == "broken":
            raise ZeroDivisionError
        return self.grammars.matcher(request)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def grammars(directory):
    local = LocalGenerator.load(directory, num_pages=1)
    held = HeldGrammars(make_grammars(local, Tokenizer(directory)))
    held.engine = make_engine(local, held, max_waiting=3)
    yield held
    held.may_go.set()


@pytest.fixture
def service(grammars):
    service = RouterService(grammars.engine, None, lambda: None)
    yield service
    service.close()


def submit(service, gateway, name, constraint, **sampling):
    service.on_message(gateway, wire.submit(make_request(name, constraint, **sampling)))


def test_an_answer_comes_back_in_its_form(service, directory):
    gateway = Gateway()
    submit(service, gateway, "a", choice("yes", "no"))
    assert Tokenizer(directory).decode(tokens_of(gateway.answer())) in ("yes", "no")


def test_while_one_compiles_the_others_are_answered(service, grammars):
    gateway = Gateway()
    submit(service, gateway, "slow", regex("held"))
    assert grammars.entered.acquire(timeout=30)
    submit(service, gateway, "free", None, max_tokens=3)
    assert {delta.request_id for delta in gateway.answer()} == {"free"}
    submit(service, gateway, "quick", choice("yes"))
    assert {delta.request_id for delta in gateway.answer()} == {"quick"}
    grammars.may_go.set()
    assert {delta.request_id for delta in gateway.answer()} == {"slow"}


def test_those_that_compile_count_among_those_that_wait(service, grammars):
    gateway = Gateway()
    for name in ("a", "b", "c"):
        submit(service, gateway, name, regex("held"))
    for _ in range(2):
        assert grammars.entered.acquire(timeout=30)
    submit(service, gateway, "d", None, max_tokens=1)
    [refused] = gateway.answer()
    assert (refused.request_id, refused.failure.kind) == ("d", "queue_full")
    grammars.may_go.set()
    assert {gateway.answer()[-1].finish for _ in range(3)} == {"stop"}


def test_one_that_is_cancelled_while_it_compiles_never_runs(service, grammars):
    gateway = Gateway()
    submit(service, gateway, "gone", regex("held"))
    assert grammars.entered.acquire(timeout=30)
    service.on_message(gateway, wire.cancel("gone"))
    submit(service, gateway, "gone", choice("no"))  # the same name again, of another request
    assert len(tokens_of(gateway.answer())) >= 1
    grammars.may_go.set()
    submit(service, gateway, "after", regex("held"))
    assert {delta.request_id for delta in gateway.answer()} == {"after"}
    assert grammars.engine.load.num_generated_tokens < 20


def test_a_gateway_that_goes_takes_what_compiles_with_it(service, grammars):
    gone, other = Gateway(), Gateway()
    submit(service, gone, "gone", regex("held"))
    assert grammars.entered.acquire(timeout=30)
    service.on_close(gone)
    submit(service, other, "a", choice("yes"))
    other.answer()
    grammars.may_go.set()
    submit(service, other, "b", regex("held"))
    other.answer()
    assert gone.deltas.empty()


@pytest.mark.parametrize(("expression", "kind", "field"), [("(a", "invalid_request", "constraint"), ("broken", "internal", None)])
def test_what_does_not_compile_is_answered_as_a_failure(service, expression, kind, field):
    gateway = Gateway()
    submit(service, gateway, "bad", regex(expression))
    [delta] = gateway.answer()
    assert (delta.finish, delta.failure.kind, delta.failure.field) == ("error", kind, field)
    submit(service, gateway, "bad", choice("yes"))
    assert gateway.answer()[-1].finish == "stop"


def test_a_second_request_of_the_same_id_is_refused_while_the_first_compiles(service, grammars):
    gateway = Gateway()
    submit(service, gateway, "a", regex("held"))
    assert grammars.entered.acquire(timeout=30)
    for constraint in (None, regex("held")):
        submit(service, gateway, "a", constraint)
        [delta] = gateway.answer()
        assert (delta.failure.kind, delta.failure.field) == (InvalidRequest.kind, "request_id")
    grammars.may_go.set()
    assert gateway.answer()[-1].finish == "stop"


def test_what_the_engine_refuses_is_told(service):
    gateway = Gateway()
    submit(service, gateway, "long", choice("yes"), max_tokens=99_999)
    assert gateway.answer()[-1].failure.field == "max_tokens"
