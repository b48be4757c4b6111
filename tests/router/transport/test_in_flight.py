import pytest

from router.errors import FrameError
from router.transport.frames import FrameKind, Header
from router.transport.in_flight import InFlight, SentFrame


def answer(sequence, attempt, kind=FrameKind.BUSY, **sizes):
    return Header(kind, 1, sequence, attempt, **sizes)


def test_only_the_first_answer_to_the_present_attempt_counts():
    in_flight = InFlight()
    in_flight.begin(7, SentFrame(attempt=2, num_tokens=3, hidden_size=4))
    assert in_flight.accept(answer(7, 1)) is None
    assert in_flight.accept(answer(8, 2)) is None
    assert in_flight.num_waiting == 1
    assert in_flight.accept(answer(7, 2)).is_answered
    assert in_flight.accept(answer(7, 2)) is None
    assert (in_flight.num_waiting, len(in_flight)) == (0, 1)
    assert in_flight.end(7).is_answered
    assert in_flight.end(7) is None
    assert (in_flight.num_waiting, len(in_flight)) == (0, 0)


def test_frame_that_ends_unanswered_is_no_longer_waited_for():
    in_flight = InFlight()
    in_flight.begin(7, SentFrame(1, 3, 4))
    assert not in_flight.end(7).is_answered
    assert in_flight.num_waiting == 0
    assert in_flight.accept(answer(7, 1)) is None


def test_partial_of_another_size_is_an_error():
    in_flight = InFlight()
    in_flight.begin(7, SentFrame(1, 3, 4))
    with pytest.raises(FrameError, match=r"\[3, 4\] tokens with \[3, 5\]"):
        in_flight.accept(answer(7, 1, FrameKind.PARTIAL, num_tokens=3, hidden_size=5))


def test_sequence_is_unique():
    in_flight = InFlight()
    in_flight.begin(7, SentFrame(1, 3, 4))
    with pytest.raises(AssertionError):
        in_flight.begin(7, SentFrame(2, 3, 4))
