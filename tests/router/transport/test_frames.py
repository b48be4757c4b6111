import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import FrameError
from router.transport.frames import HEADER_BYTES, SHARED, FrameKind, Header, decode_frame, pack_header, unpack_header

headers = st.builds(
    lambda *fields: Header(*fields),
    st.sampled_from([FrameKind.PING, FrameKind.PONG, FrameKind.CANCEL]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)


@given(headers)
def test_header_round_trip(header):
    assert unpack_header(pack_header(header)) == header


@given(headers, st.data())
def test_truncated_header_is_refused(header, data):
    packed = pack_header(header)
    with pytest.raises(FrameError, match="truncated"):
        unpack_header(packed[: data.draw(st.integers(0, len(packed) - 1))])


@given(headers, st.data())
def test_flipped_header_is_refused(header, data):
    packed = bytearray(pack_header(header))
    packed[data.draw(st.integers(0, HEADER_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        unpack_header(packed)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_parsed_without_another_error(junk):
    with pytest.raises(FrameError):
        decode_frame(junk)


def sealed(**fields):
    """A header with a right checksum whatever its fields say."""
    return pack_header(Header(**{"kind": FrameKind.EXPERTS, "incarnation": 1, **fields}))


SIZES = {"num_tokens": 2, "hidden_size": 4, "top_k": 1, "dtype": 1, "length": 2 * 4 * 4 + 2 * 4 + 2 * 2}


def test_sizes_that_agree_are_taken():
    assert unpack_header(sealed(**SIZES)).length == SIZES["length"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": 0},
        {"kind": 77},
        {"length": 45},
        {"length": 1 << 63},
        {"num_tokens": 0},
        {"num_tokens": 0xFFFFFFFF, "length": 0xFFFFFFFF},
        {"hidden_size": 0xFFFFFFFF},
        {"top_k": 0},
        {"top_k": 0xFFFF},
        {"dtype": 0},
        {"dtype": 9},
        {"flags": 0x80},
        {"kind": FrameKind.PARTIAL},
        {"kind": FrameKind.PARTIAL, "length": 32, "dtype": 2},
        {"kind": FrameKind.PING},
        {"kind": FrameKind.FAILED, "length": 1 << 20},
        {"kind": FrameKind.MESSAGE, "length": (64 << 20) + 1},
        {"kind": FrameKind.MESSAGE, "flags": SHARED},
    ],
)
def test_sizes_that_lie_are_refused_even_with_a_right_checksum(wrong):
    with pytest.raises(FrameError):
        unpack_header(sealed(**{**SIZES, **wrong}))


def test_limit_of_the_reader_counts():
    with pytest.raises(FrameError, match="limit is 10"):
        unpack_header(sealed(**SIZES), max_payload_bytes=10)


def test_other_protocol_and_version_are_named():
    packed = bytearray(sealed(**SIZES))
    with pytest.raises(FrameError, match="not a Shoal frame"):
        unpack_header(b"HTTP" + packed[4:])
    packed[4] = 250
    packed[-4:] = struct.pack("<I", zlib.crc32(packed[:-4]))
    with pytest.raises(FrameError, match="version 250"):
        unpack_header(packed)


def test_shared_payload_is_refused_where_there_is_no_shared_buffer():
    with pytest.raises(FrameError, match="shared"):
        decode_frame(sealed(**SIZES, flags=SHARED))
