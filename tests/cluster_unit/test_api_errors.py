import grpc
import pytest

import cluster.errors
import router.errors
from cluster.api.errors import MAX_MESSAGE, STATUSES, CoordinatorAway, NotReady, RequestRefused, describe
from cluster.coordinator import Outranked
from cluster.operations import BadBounds, UnknownHost, UnknownOperation
from model.errors import ChatTemplateMissing, CheckpointError
from router.request import Failure

Code = grpc.StatusCode

# The answer column of the table of bad input.
PROMISED = [
    (router.errors.InvalidRequest("bad", field="top_p"), 400, Code.INVALID_ARGUMENT),
    (ChatTemplateMissing("no template"), 400, Code.FAILED_PRECONDITION),
    (router.errors.QueueFull("full"), 429, Code.RESOURCE_EXHAUSTED),
    (router.errors.DeadlineExceeded("late"), 408, Code.DEADLINE_EXCEEDED),
    (router.errors.RequestCancelled("gone"), 499, Code.CANCELLED),
    (router.errors.ExpertsUnavailable("layer 1 expert 2"), 503, Code.UNAVAILABLE),
    (router.errors.ChannelClosed("gone"), 503, Code.UNAVAILABLE),
    (cluster.errors.NoRouter("none"), 503, Code.UNAVAILABLE),
    (NotReady("wait"), 503, Code.UNAVAILABLE),
    (CoordinatorAway("ask again"), 503, Code.UNAVAILABLE),
    (Outranked("another"), 503, Code.UNAVAILABLE),
    (UnknownHost("none"), 404, Code.NOT_FOUND),
    (UnknownOperation("none"), 404, Code.NOT_FOUND),
    (BadBounds("no"), 400, Code.INVALID_ARGUMENT),
    (RequestRefused(Failure("queue_full", "full")), 429, Code.RESOURCE_EXHAUSTED),
    (RequestRefused(Failure("never heard of", "secret")), 500, Code.INTERNAL),
    (CheckpointError("secret"), 500, Code.INTERNAL),
    (ValueError("secret"), 500, Code.INTERNAL),
]


@pytest.mark.parametrize(("error", "http", "code"), PROMISED, ids=lambda value: getattr(value, "kind", None))
def test_status_of_each_error(error, http, code):
    problem = describe(error, "id-1")
    assert (problem.status.http, problem.status.grpc) == (http, code)
    assert problem.openai_body()["error"]["code"] == problem.kind
    if http == 500:
        assert "secret" not in problem.message
        assert "id-1" in problem.message
    else:
        assert problem.message == str(error)
        assert problem.kind == error.kind


def test_every_request_error_has_a_row():
    kinds = {kind.kind for kind in router.errors.RequestError.__subclasses__()} | {router.errors.ExpertsUnavailable.kind}
    assert kinds <= set(STATUSES)


def test_clients_are_told_when_to_retry():
    assert STATUSES["queue_full"].headers["retry-after"] == "1"
    assert STATUSES["deadline_exceeded"].headers["x-should-retry"] == "false"


def test_internal_errors_are_in_the_log_only(caplog):
    def fails():
        raise ValueError("secret")

    try:
        try:
            fails()
        except ValueError as error:
            raise RuntimeError("secret") from error
    except RuntimeError as error:
        describe(error, "id-7")
    for part in ("id-7", "RuntimeError", "caused by ValueError", "Traceback", ", in fails"):
        assert part in caplog.text
    assert ": secret" not in caplog.text, "an error's words may be a client's"


def test_long_sentences_fit_a_header():
    assert len(describe(router.errors.InvalidRequest("x" * 10**5), "id").message) < MAX_MESSAGE + 10
