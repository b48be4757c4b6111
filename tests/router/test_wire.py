"""Requests and deltas come out of the channel as they went in: through msgpack, as real messages do."""

from hypothesis import given
from hypothesis import strategies as st

from router import wire
from router.request import Delta, Failure, PositionLogprobs, Request, SamplingParams, TokenLogprob
from router.transport.messages import decode_message, encode_message

token_ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
tokens = st.builds(TokenLogprob, st.integers(0, 2**31), st.floats(max_value=0.0, allow_nan=False), st.integers(1, 2**31))
positions = st.builds(PositionLogprobs, tokens, st.lists(tokens, max_size=3).map(tuple))
failures = st.builds(Failure, st.text(max_size=8), st.text(max_size=8), st.none() | st.text(max_size=8))
deltas = st.builds(
    Delta,
    st.text(max_size=8),
    token_ids,
    st.lists(positions, max_size=3).map(tuple),
    st.none() | st.lists(st.none() | positions, max_size=3).map(tuple),
    st.sampled_from([None, "stop", "length", "cancelled", "error"]),
    st.none() | failures,
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0.0, 10.0),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    seed=st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100.0, 100.0), max_size=4),
    stop_token_ids=token_ids,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    request_id=st.text(max_size=8),
    prompt_token_ids=token_ids,
    generated_token_ids=token_ids,
    sampling=samplings,
    deadline_s=st.none() | st.floats(-10.0, 1e6),
)


def carried(message):
    return decode_message(encode_message(1, message)[1])


@given(st.lists(deltas, max_size=4))
def test_deltas_round_trip(sent):
    assert wire.deltas_from_wire(carried(wire.deltas_to_wire(sent))) == sent


@given(requests)
def test_request_round_trip(request):
    message = carried(wire.submit(request))
    assert set(message) == {"submit"}
    assert Request.model_validate(message["submit"]) == request


@given(st.text(max_size=8))
def test_cancel_round_trip(request_id):
    assert carried(wire.cancel(request_id)) == {"cancel": request_id}
