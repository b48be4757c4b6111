import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.errors import FrameError
from router.transport.frames import MAX_REASON_BYTES, ExpertsAnswer, FrameKind, decode_frame
from router.transport.payloads import (
    MAX_PLACES,
    Places,
    encode_answer,
    encode_request,
    request_header,
    shared_bytes_of,
    view_answer,
    view_request,
)
from tests.router.transport.samples import assert_equal_requests, make_request, requests

reasons = st.builds(
    lambda kind, reason: ExpertsAnswer(5, 1, kind, None, reason),
    st.sampled_from([FrameKind.NOT_HERE, FrameKind.BUSY, FrameKind.FAILED]),
    st.text(max_size=40),
)
partials = st.builds(
    lambda rows, columns: ExpertsAnswer(5, 1, FrameKind.PARTIAL, torch.randn(rows, columns)), st.integers(1, 5), st.integers(1, 9)
)


@given(requests, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_request_round_trip(request, incarnation, sequence, attempt):
    header, payload = decode_frame(b"".join(encode_request(incarnation, sequence, attempt, request)))
    assert (header.incarnation, header.sequence, header.attempt) == (incarnation, sequence, attempt)
    assert_equal_requests(view_request(header, payload), request)


@given(partials | reasons)
def test_answer_round_trip(answer):
    header, payload = decode_frame(b"".join(encode_answer(3, answer)))
    decoded = view_answer(header, payload)
    assert (decoded.sequence, decoded.attempt, decoded.kind, decoded.reason) == (5, 1, answer.kind, answer.reason)
    if answer.partial is None:
        assert decoded.partial is None
    else:
        assert torch.equal(decoded.partial, answer.partial)


frames = requests.map(lambda request: b"".join(encode_request(1, 2, 3, request))) | (partials | reasons).map(
    lambda answer: b"".join(encode_answer(1, answer))
)


@given(frames, st.data())
def test_any_truncation_or_surplus_is_an_error(frame, data):
    with pytest.raises(FrameError):
        decode_frame(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(FrameError):
        decode_frame(frame + data.draw(st.binary(min_size=1, max_size=9)))


@given(frames, st.data())
def test_any_flipped_byte_is_an_error(frame, data):
    flipped = bytearray(frame)
    flipped[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        decode_frame(flipped)


@given(requests, st.integers(0, 8).map(lambda n: n * 64))
def test_request_laid_into_a_buffer_is_read_back_and_stays_inside(request, offset):
    header = request_header(1, 2, 3, request)
    answer_offset, num_bytes = shared_bytes_of(*header.sizes)
    assert answer_offset >= header.length
    assert answer_offset % 64 == 0
    buffer = mmap.mmap(-1, offset + num_bytes + 8)
    buffer[:] = b"\xaa" * len(buffer)
    Places(buffer).at(offset, header.sizes).write(request)
    assert_equal_requests(view_request(header, buffer, offset), request)
    assert buffer[:offset] == b"\xaa" * offset
    assert buffer[offset + header.length :] == b"\xaa" * (num_bytes - header.length + 8)


def test_views_share_memory_with_the_mapping():
    request = make_request()
    header = request_header(1, 2, 3, request)
    mapping = mmap.mmap(-1, 4096)
    Places(mapping).at(64, header.sizes).write(request)
    view_request(header, mapping, 64).hidden.zero_()
    assert not view_request(header, mapping, 64).hidden.any()


def test_tensors_that_are_not_contiguous_travel_as_their_values():
    wide = make_request(num_tokens=4, hidden_size=6)
    request = make_request(num_tokens=6, hidden_size=4)
    request = type(request)(request.layer, request.map_version, wide.hidden.T, request.expert_ids, request.weights)
    header, payload = decode_frame(b"".join(encode_request(1, 2, 3, request)))
    assert torch.equal(view_request(header, payload).hidden, wide.hidden.T)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("hidden", torch.zeros(3, 5, dtype=torch.float64)),
        ("hidden", torch.zeros(4, 5)),
        ("hidden", torch.zeros(3)),
        ("hidden", torch.zeros(3, 0)),
        ("expert_ids", torch.zeros(3, 2, dtype=torch.int64)),
        ("expert_ids", torch.zeros(3, 3, dtype=torch.int16)),
        ("weights", torch.zeros(3, 2, dtype=torch.bfloat16)),
    ],
)
def test_request_that_has_no_place_in_a_frame_is_refused(field, wrong):
    request = make_request()
    fields = {name: getattr(request, name) for name in ("layer", "map_version", "hidden", "expert_ids", "weights")}
    with pytest.raises(FrameError):
        encode_request(1, 2, 3, type(request)(**{**fields, field: wrong}))


@pytest.mark.parametrize("partial", [None, torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 4, dtype=torch.bfloat16)])
def test_partial_that_has_no_place_in_a_frame_is_refused(partial):
    with pytest.raises(FrameError, match="PARTIAL"):
        encode_answer(1, ExpertsAnswer(1, 1, FrameKind.PARTIAL, partial))


def test_long_reason_is_cut():
    header, payload = decode_frame(b"".join(encode_answer(1, ExpertsAnswer(1, 1, FrameKind.FAILED, None, "é" * 5000))))
    assert header.length == MAX_REASON_BYTES
    assert view_answer(header, payload).reason.startswith("é" * 2000)


def test_places_are_kept_within_a_limit_and_by_all_that_makes_them():
    mapping = mmap.mmap(-1, (MAX_PLACES + 2) * 4096)
    places = Places(mapping)
    small, wide = (request_header(1, 2, 3, make_request(num_tokens=2, hidden_size=width)) for width in (8, 16))
    assert places.at(0, small.sizes) is places.at(0, small.sizes)
    assert places.at(0, wide.sizes).hidden.shape == (2, 16)
    for number in range(1, MAX_PLACES + 1):
        places.at(number * 4096, small.sizes)
    assert places.at(0, small.sizes).hidden.shape == (2, 8)
