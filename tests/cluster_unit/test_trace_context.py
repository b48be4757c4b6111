import pytest

from cluster.api.trace_context import TraceContext, begin, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TEXT = f"00-{TRACE}-{SPAN}-01"


def test_a_traceparent_is_read_and_written_as_it_was():
    context = parse(TEXT)
    assert context == TraceContext(TRACE, SPAN, is_sampled=True)
    assert context.as_text() == TEXT


def test_a_child_stays_in_its_trace_under_a_span_id_of_its_own():
    child = TraceContext(TRACE, SPAN, is_sampled=True).child()
    assert (child.trace_id, child.is_sampled) == (TRACE, True)
    assert child.span_id != SPAN
    assert parse(child.as_text()) == child


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("ff", True)])
def test_only_the_lowest_flag_says_sampled(flags, is_sampled):
    assert parse(f"00-{TRACE}-{SPAN}-{flags}") == TraceContext(TRACE, SPAN, is_sampled)


def test_a_later_version_is_read_as_far_as_this_one_goes():
    assert parse(f"cc-{TRACE}-{SPAN}-01-what-the-future-has") == TraceContext(TRACE, SPAN, is_sampled=True)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nothing",
        TEXT + "-more",
        TEXT + "0",
        TEXT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-zz",
        f"00-{TRACE}-{SPAN}-0\n1",
        f"cc-{TRACE}-{SPAN}-01-" + "x" * 10_000,
        f"{TEXT}\n",
    ],
)
def test_what_is_no_traceparent_is_none(text):
    assert parse(text) is None


def test_a_new_trace_is_one_that_parses_and_no_two_are_alike():
    contexts = [begin(is_sampled=True) for _ in range(3)]
    assert [parse(context.as_text()) for context in contexts] == contexts
    assert len({context.trace_id for context in contexts}) == 3
