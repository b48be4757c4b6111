"""Machine code's frames are those of `frames`, byte for byte; what is not all that it should be is refused."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.transport import compiled_frames as compiled
from router.transport.frames import HEADER_BYTES, IS_PREFILL, SHARED, FrameKind, Header, pack_header, payload_layout, unpack_header
from router.transport.payloads import shared_bytes_of

FLOAT32 = 1
BUFFER_BYTES = 1 << 20

words = st.integers(0, 2**64 - 1)
small = st.integers(0, 2**62)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 9))


def place_of(packed):
    room = np.frombuffer(bytearray(packed), np.uint8)
    return room, room.ctypes.data


def request_header(size=(3, 8, 2), *, incarnation=5, sequence=6, attempt=1, epoch=0, n=0, layer=7, flags=SHARED, offset=0, length=None):
    layout = payload_layout(*size, 4)
    length = layout.num_bytes if length is None else length
    return Header(FrameKind.EXPERTS, incarnation, sequence, attempt, epoch, n, layer, *size, FLOAT32, flags, offset, length)


@given(sizes)
def test_payloads_lie_where_the_format_says(size):
    layout = payload_layout(*size, 4)
    assert compiled.weights_offset(*size[:2]) == layout.weights_offset
    assert compiled.ids_offset(*size) == layout.expert_ids_offset
    assert compiled.request_bytes(*size) == layout.num_bytes
    assert (compiled.answer_offset(*size), compiled.shared_bytes(*size)) == shared_bytes_of(*size, FLOAT32)


@given(sizes, words, small, small, small, st.integers(0, 2**32 - 1), st.integers(0, 1 << 40))
def test_a_request_is_written_as_it_is_packed(size, incarnation, sequence, epoch, n, layer, offset):
    expected = request_header(size, incarnation=incarnation, sequence=sequence, epoch=epoch, n=n, layer=layer, offset=offset)
    room, place = place_of(bytes(HEADER_BYTES))
    life = compiled.as_word(incarnation)
    compiled.write_request(place, life, sequence, epoch, n, layer, *size, offset)
    assert room.tobytes() == pack_header(expected)
    assert unpack_header(room.tobytes(), 1 << 60) == expected


@given(sizes, words, small, st.integers(0, 2**32 - 1), st.integers(0, 1 << 40))
def test_an_answer_is_written_as_it_is_packed_and_read_as_what_it_is(size, incarnation, sequence, attempt, offset):
    _request, request = place_of(pack_header(request_header(size, incarnation=incarnation, sequence=sequence, attempt=attempt)))
    room, place = place_of(bytes(HEADER_BYTES))
    compiled.write_partial(place, request, offset)
    num_tokens, width, _ = size
    length = 4 * num_tokens * width
    expected = Header(FrameKind.PARTIAL, incarnation, sequence, attempt, 0, 0, 0, num_tokens, width, 0, FLOAT32, SHARED, offset, length)
    assert room.tobytes() == pack_header(expected)
    life = compiled.as_word(incarnation)
    assert compiled.is_answer(place, life, sequence, num_tokens, width, offset) == (attempt == 1)
    assert not compiled.is_answer(place, life ^ 1, sequence, num_tokens, width, offset)
    assert not compiled.is_answer(place, life, sequence + 1, num_tokens, width, offset)
    assert not compiled.is_answer(place, life, sequence, num_tokens + 1, width, offset)
    assert not compiled.is_answer(place, life, sequence, num_tokens, width, offset + 64)


@given(sizes, st.integers(0, HEADER_BYTES - 1), st.integers(0, 7))
def test_one_wrong_bit_anywhere_and_it_is_refused(size, byte, bit):
    packed = bytearray(pack_header(request_header(size)))
    _room, place = place_of(packed)
    assert compiled.is_decode(place, 5, BUFFER_BYTES)
    packed[byte] ^= 1 << bit
    _broken, place = place_of(packed)
    assert not compiled.is_decode(place, 5, BUFFER_BYTES)


def test_a_sound_header_that_is_no_decode_in_the_buffer_is_refused():
    size = (3, 8, 2)
    room = shared_bytes_of(*size, FLOAT32)[1]

    def is_decode(header, buffer_bytes=room):
        _held, place = place_of(pack_header(header))
        return compiled.is_decode(place, 5, buffer_bytes)

    good = request_header(size)
    assert is_decode(good)
    assert is_decode(request_header(size, offset=64), room + 64)
    assert not is_decode(good, room - 1)
    for wrong in (
        request_header(size, flags=SHARED | IS_PREFILL),
        request_header(size, flags=0),
        request_header(size, offset=1 << 50),
        request_header(size, offset=2**64 - 64),
        request_header(size, length=1),
        request_header(size, incarnation=6),
        request_header((0, 8, 2)),
        request_header((1 << 21, 8, 2)),
        request_header((3, 1 << 18, 2)),
        request_header((3, 8, 0)),
        request_header((3, 8, 1 << 11)),
        good._replace(kind=FrameKind.PARTIAL),
        good._replace(dtype=2),
        good._replace(payload_crc=1),
    ):
        assert not is_decode(wrong, 1 << 50), wrong
    assert not is_decode(request_header(size, offset=32), room + 64)
