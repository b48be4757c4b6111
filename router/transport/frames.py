"""Frames: the fixed header, and the typed messages of the data plane.

A frame is one header of `HEADER_BYTES` and one payload, little-endian. The header ends with a CRC of itself, so a length is
never believed before it is known to be what was sent; the sizes it declares are bounded and must agree with each other.
A payload that follows its header in the stream carries a CRC; one that lies in shared memory does not: no wire is
between its writer and its reader, and a checksum would read every byte twice more on the one path that is there to be fast.
"""

import functools
import struct
import zlib
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from router.errors import FrameError
from router.placement_map import MapVersion

Bytes: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"SHOL"
PROTOCOL_VERSION = 1

MAX_TOKENS = 1 << 20
MAX_HIDDEN_SIZE = 1 << 17
MAX_TOP_K = 1 << 10
MAX_REASON_BYTES = 4096
MAX_MESSAGE_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 30

HIDDEN_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
DTYPE_CODES = {dtype: code for code, dtype in HIDDEN_DTYPES.items()}
NO_DTYPE = 0

IS_PREFILL = 1
SHARED = 2  # the payload lies at `offset` of the channel's shared buffer and does not follow in the stream


class FrameKind(IntEnum):
    """What a frame says."""

    EXPERTS = 1  # router -> host: run these experts on these tokens
    PARTIAL = 2  # host -> router: one partial sum per token
    NOT_HERE = 3  # host -> router: an expert of the frame is not held here; nothing was computed
    BUSY = 4  # host -> router: past the granted credits; nothing was computed
    FAILED = 5  # host -> router: the computation raised; payload is a sentence
    PING = 6  # either way, answered by the I/O thread, apart from compute
    PONG = 7
    CANCEL = 8  # router -> host: skip frame `sequence` if it still waits
    MESSAGE = 9  # gateway <-> router: a msgpack message


ANSWER_KINDS = frozenset({FrameKind.PARTIAL, FrameKind.NOT_HERE, FrameKind.BUSY, FrameKind.FAILED})
EMPTY_KINDS = frozenset({FrameKind.PING, FrameKind.PONG, FrameKind.CANCEL})


class ExpertsRequest(NamedTuple):
    """Hidden [T, H] in the model's dtype, expert_ids [T, K] int16 (-1: not on this host), weights [T, K] float32."""

    layer: int
    map_version: MapVersion
    hidden: Tensor
    expert_ids: Tensor
    weights: Tensor
    is_prefill: bool = False


class ExpertsAnswer(NamedTuple):
    """PARTIAL: partial [T, H] float32. Otherwise partial is None and `reason` is the sentence."""

    sequence: int
    attempt: int
    kind: FrameKind
    partial: Tensor | None = None
    reason: str = ""


class Sizes(NamedTuple):
    """Of an EXPERTS frame: T, H, K, and the code of hidden's dtype."""

    num_tokens: int
    hidden_size: int
    top_k: int
    dtype: int


class Header(NamedTuple):
    """The fields of a frame's header, in their order on the wire; those that a kind has no use for are 0.

    `num_answered` of a PONG travels in `map_n`: how many frames the host has answered since it started.
    """

    kind: int
    incarnation: int
    sequence: int = 0
    attempt: int = 0
    map_epoch: int = 0
    map_n: int = 0
    layer: int = 0
    num_tokens: int = 0
    hidden_size: int = 0
    top_k: int = 0
    dtype: int = NO_DTYPE
    flags: int = 0
    offset: int = 0
    length: int = 0
    payload_crc: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Equal to the request's `Sizes`."""
        return self[7:11]


class PayloadLayout(NamedTuple):
    """Where the parts of an EXPERTS payload lie: hidden at 0, weights and expert_ids at these offsets, bytes in all."""

    weights_offset: int
    expert_ids_offset: int
    num_bytes: int


_FIELDS = struct.Struct("<4sBBQQIQQIIIIBBQQI")
_CRC = struct.Struct("<I")
_FIELDS_BYTES = _FIELDS.size
HEADER_BYTES = _FIELDS_BYTES + _CRC.size


def payload_layout(num_tokens: int, hidden_size: int, top_k: int, dtype_bytes: int) -> PayloadLayout:
    """Hidden [T, H], then weights [T, K] float32 at the next multiple of 4, then expert_ids [T, K] int16."""
    weights_offset = (num_tokens * hidden_size * dtype_bytes + 3) & ~3
    expert_ids_offset = weights_offset + num_tokens * top_k * 4
    return PayloadLayout(weights_offset, expert_ids_offset, expert_ids_offset + num_tokens * top_k * 2)


def pack_header(header: Header) -> bytes:
    """The header as it travels, its CRC last."""
    return pack_fields(*header)


def pack_fields(*header: int) -> bytes:
    """The same from the fields of a `Header`, where making one is time that every frame would pay."""
    fields = _FIELDS.pack(MAGIC, PROTOCOL_VERSION, *header)
    return fields + _CRC.pack(zlib.crc32(fields))


def unpack_header(buffer: Bytes, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> Header:
    """The header at the start of `buffer`. FrameError unless every field is one that a sound peer can send."""
    if len(buffer) < HEADER_BYTES:
        raise FrameError(f"truncated frame: {len(buffer)} bytes, a header has {HEADER_BYTES}")
    fields = _FIELDS.unpack_from(buffer)
    if fields[0] != MAGIC:
        raise FrameError(f"not a Shoal frame: it begins with {fields[0]!r}, ours with {MAGIC!r}")
    if fields[1] != PROTOCOL_VERSION:
        raise FrameError(f"the peer speaks protocol version {fields[1]}, this process {PROTOCOL_VERSION}: run one version of Shoal")
    if zlib.crc32(memoryview(buffer)[:_FIELDS_BYTES]) != _CRC.unpack_from(buffer, _FIELDS_BYTES)[0]:
        raise FrameError("corrupted frame: the header does not match its checksum")
    header = Header._make(fields[2:])
    _check_sizes(header.kind, header[7:12], header.length, max_payload_bytes)
    return header


def check_payload(header: Header, payload: Bytes) -> None:
    """FrameError unless the payload is whole and matches the header's checksum."""
    view = memoryview(payload).cast("B")
    if len(view) != header.length:
        raise FrameError(f"frame with a payload of {len(view)} bytes, its header declares {header.length}")
    if zlib.crc32(view) != header.payload_crc:
        raise FrameError("corrupted frame: the payload does not match its checksum")


def decode_frame(frame: Bytes, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> tuple[Header, bytearray]:
    """One whole frame as it travels in a stream: its header and a copy of its payload, both checked."""
    view = memoryview(frame).cast("B")
    header = unpack_header(view, max_payload_bytes)
    if header.flags & SHARED:
        raise FrameError("the frame's payload lies in a shared buffer, but this channel has none")
    payload = bytearray(view[HEADER_BYTES:])
    check_payload(header, payload)
    return header, payload


class _Declared(NamedTuple):
    """What a header says of its payload."""

    kind: int
    num_tokens: int
    hidden_size: int
    top_k: int
    dtype: int
    flags: int
    length: int


@functools.lru_cache(4096)  # a steady load declares the same few sizes again and again
def _check_sizes(kind: int, sizes_and_flags: tuple[int, ...], length: int, max_payload_bytes: int) -> None:
    header = _Declared._make((kind, *sizes_and_flags, length))
    if length > max_payload_bytes:
        raise FrameError(f"frame declares {length} payload bytes, the limit is {max_payload_bytes}")
    if header.flags & ~(IS_PREFILL | SHARED):
        raise FrameError(f"frame with unknown flags {header.flags:#x}")
    if kind == FrameKind.EXPERTS:
        _check_tensor_sizes(header)
        if not 0 < header.top_k <= MAX_TOP_K:
            raise FrameError(f"EXPERTS frame declares {header.top_k} experts a token, not between 1 and {MAX_TOP_K}")
        dtype = HIDDEN_DTYPES.get(header.dtype)
        if dtype is None:
            raise FrameError(f"EXPERTS frame with unknown dtype code {header.dtype}")
        expected = payload_layout(header.num_tokens, header.hidden_size, header.top_k, dtype.itemsize).num_bytes
    elif kind == FrameKind.PARTIAL:
        _check_tensor_sizes(header)
        if header.dtype != DTYPE_CODES[torch.float32]:
            raise FrameError(f"PARTIAL frame with dtype code {header.dtype}: partial sums are float32")
        expected = header.num_tokens * header.hidden_size * 4
    else:
        expected = _check_other_kind(header)
    if length != expected:
        raise FrameError(f"frame of kind {kind} declares {length} payload bytes, its sizes make {expected}")


def _check_tensor_sizes(header: _Declared) -> None:
    if not (0 < header.num_tokens <= MAX_TOKENS and 0 < header.hidden_size <= MAX_HIDDEN_SIZE):
        raise FrameError(
            f"frame declares a tensor of [{header.num_tokens}, {header.hidden_size}], limits [{MAX_TOKENS}, {MAX_HIDDEN_SIZE}]"
        )


def _check_other_kind(header: _Declared) -> int:
    """The only payload length that a frame without tensors may have."""
    if header.flags & SHARED:
        raise FrameError(f"frame of kind {header.kind} cannot have its payload in a shared buffer")
    if header.kind in EMPTY_KINDS:
        return 0
    if header.kind == FrameKind.MESSAGE:
        return min(header.length, MAX_MESSAGE_BYTES)
    if header.kind in ANSWER_KINDS:
        return min(header.length, MAX_REASON_BYTES)
    raise FrameError(f"unknown frame kind {header.kind}")
