"""Frames as machine code writes and reads them: the headers of a decode step's EXPERTS and PARTIAL frames in shared memory.

The format is that of `router.transport.frames`, byte for byte. Whatever else arrives is left to that module, and what is wrong with it
is told by it: here a frame is either all that it should be, or not for machine code.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from router.compiled import compiled
from router.transport.frames import (
    DTYPE_CODES,
    HEADER_BYTES,
    MAGIC,
    MAX_HIDDEN_SIZE,
    MAX_TOKENS,
    MAX_TOP_K,
    NO_DTYPE,
    PROTOCOL_VERSION,
    SHARED,
    FrameKind,
)

FLOAT32 = DTYPE_CODES[torch.float32]
_EXPERTS, _PARTIAL = int(FrameKind.EXPERTS), int(FrameKind.PARTIAL)
_MAGIC = int.from_bytes(MAGIC, "little")
# Where a header's fields begin.
_VERSION, _KIND, _INCARNATION, _SEQUENCE, _ATTEMPT, _EPOCH, _N, _LAYER = 4, 5, 6, 14, 22, 26, 34, 42
_TOKENS, _HIDDEN, _TOP_K, _DTYPE, _FLAGS, _OFFSET, _LENGTH, _PAYLOAD_CRC, _CRC = 46, 50, 54, 58, 59, 60, 68, 76, 80
_POLYNOMIAL = 0xEDB88320  # of zlib's CRC


def _remainders() -> Any:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_REMAINDERS = _remainders()


def as_word(number: int) -> int:
    """The signed word with the bits of an unsigned one: an incarnation takes all 64."""
    return number - (1 << 64) if number >> 63 else number


def _loading(bits: int) -> Any:
    kind = ir.IntType(bits)

    @intrinsic  # type: ignore[untyped-decorator]
    def load(_context: Any, _address: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            value = builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return types.int64(types.intp), generate

    return load


def _storing(bits: int) -> Any:
    kind = ir.IntType(bits)

    @intrinsic  # type: ignore[untyped-decorator]
    def store(_context: Any, _address: Any, _value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], kind)
            builder.store(value, builder.inttoptr(arguments[0], kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.int64), generate

    return store


load_8: Callable[[int], int] = _loading(8)
load_32: Callable[[int], int] = _loading(32)
load_64: Callable[[int], int] = _loading(64)
store_8: Callable[[int, int], None] = _storing(8)
store_32: Callable[[int, int], None] = _storing(32)
store_64: Callable[[int, int], None] = _storing(64)


@compiled
def _crc(place: int) -> int:
    """Of a header, as zlib computes it."""
    value = 0xFFFFFFFF
    for byte in range(_CRC):
        value = int(_REMAINDERS[(value ^ load_8(place + byte)) & 0xFF]) ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@compiled
def weights_offset(num_tokens: int, hidden_size: int) -> int:
    """As `payload_layout`, of float32 hidden states."""
    return 4 * num_tokens * hidden_size


@compiled
def ids_offset(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """As `payload_layout`."""
    return weights_offset(num_tokens, hidden_size) + 4 * num_tokens * top_k  # type: ignore[no-any-return]


@compiled
def request_bytes(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """As `payload_layout`."""
    return ids_offset(num_tokens, hidden_size, top_k) + 2 * num_tokens * top_k  # type: ignore[no-any-return]


@compiled
def answer_offset(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """As `payloads.shared_bytes_of`."""
    return (request_bytes(num_tokens, hidden_size, top_k) + 63) & ~63  # type: ignore[no-any-return]


@compiled
def shared_bytes(num_tokens: int, hidden_size: int, top_k: int) -> int:
    """Of a request with room for its answer."""
    return answer_offset(num_tokens, hidden_size, top_k) + 4 * num_tokens * hidden_size  # type: ignore[no-any-return]


@compiled
def write_request(
    place: int,
    incarnation: int,
    sequence: int,
    epoch: int,
    n: int,
    layer: int,
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    offset: int,
) -> None:
    """The header of a decode's EXPERTS frame, first attempt, whose payload lies in shared memory at `offset`."""
    _write_start(place, _EXPERTS, incarnation, sequence, 1)
    store_64(place + _EPOCH, epoch)
    store_64(place + _N, n)
    store_32(place + _LAYER, layer)
    store_32(place + _TOP_K, top_k)
    _write_end(place, num_tokens, hidden_size, offset, request_bytes(num_tokens, hidden_size, top_k))


@compiled
def write_partial(place: int, request: int, offset: int) -> None:
    """The header of the answer to the EXPERTS frame whose header is at `request`."""
    _write_start(place, _PARTIAL, load_64(request + _INCARNATION), load_64(request + _SEQUENCE), load_32(request + _ATTEMPT))
    store_64(place + _EPOCH, 0)
    store_64(place + _N, 0)
    store_32(place + _LAYER, 0)
    store_32(place + _TOP_K, 0)
    num_tokens, hidden_size = load_32(request + _TOKENS), load_32(request + _HIDDEN)
    _write_end(place, num_tokens, hidden_size, offset, 4 * num_tokens * hidden_size)


@compiled
def _write_start(place: int, kind: int, incarnation: int, sequence: int, attempt: int) -> None:
    store_32(place, _MAGIC)
    store_8(place + _VERSION, PROTOCOL_VERSION)
    store_8(place + _KIND, kind)
    store_64(place + _INCARNATION, incarnation)
    store_64(place + _SEQUENCE, sequence)
    store_32(place + _ATTEMPT, attempt)


@compiled
def _write_end(place: int, num_tokens: int, hidden_size: int, offset: int, length: int) -> None:
    store_32(place + _TOKENS, num_tokens)
    store_32(place + _HIDDEN, hidden_size)
    store_8(place + _DTYPE, FLOAT32)
    store_8(place + _FLAGS, SHARED)
    store_64(place + _OFFSET, offset)
    store_64(place + _LENGTH, length)
    store_32(place + _PAYLOAD_CRC, 0)
    store_32(place + _CRC, _crc(place))


@compiled
def _is_sound(place: int, kind: int, incarnation: int) -> Any:
    """Whether the header is of this kind, of float32 in shared memory, and as it was sent."""
    return (
        load_32(place) == _MAGIC
        and load_8(place + _VERSION) == PROTOCOL_VERSION
        and load_8(place + _KIND) == kind
        and load_64(place + _INCARNATION) == incarnation
        and load_8(place + _DTYPE) == FLOAT32
        and load_8(place + _FLAGS) == SHARED
        and load_32(place + _PAYLOAD_CRC) == 0
        and load_32(place + _CRC) == _crc(place)
    )


@compiled
def is_decode(place: int, incarnation: int, buffer_bytes: int) -> Any:
    """Whether a request lies wholly in the buffer, with room for its answer, and is no prefill."""
    if not _is_sound(place, _EXPERTS, incarnation):
        return False
    num_tokens, hidden_size, top_k = tokens_of(place), hidden_size_of(place), top_k_of(place)
    if not (0 < num_tokens <= MAX_TOKENS and 0 < hidden_size <= MAX_HIDDEN_SIZE and 0 < top_k <= MAX_TOP_K):
        return False
    offset, room = offset_of(place), shared_bytes(num_tokens, hidden_size, top_k)
    if offset < 0 or offset % 64 != 0 or offset > buffer_bytes - room:
        return False
    return load_64(place + _LENGTH) == request_bytes(num_tokens, hidden_size, top_k)


@compiled
def is_answer(place: int, incarnation: int, sequence: int, num_tokens: int, hidden_size: int, offset: int) -> Any:
    """Whether it is the partial sum [T, H] that the first attempt of a request was sent for."""
    return (
        _is_sound(place, _PARTIAL, incarnation)
        and load_64(place + _SEQUENCE) == sequence
        and load_32(place + _ATTEMPT) == 1
        and tokens_of(place) == num_tokens
        and hidden_size_of(place) == hidden_size
        and load_32(place + _TOP_K) == 0
        and offset_of(place) == offset
        and load_64(place + _LENGTH) == 4 * num_tokens * hidden_size
    )


@compiled
def layer_of(place: int) -> int:
    """Of a sound header, as the three that follow."""
    return load_32(place + _LAYER)


@compiled
def tokens_of(place: int) -> int:
    """T."""
    return load_32(place + _TOKENS)


@compiled
def hidden_size_of(place: int) -> int:
    """H."""
    return load_32(place + _HIDDEN)


@compiled
def top_k_of(place: int) -> int:
    """K."""
    return load_32(place + _TOP_K)


@compiled
def offset_of(place: int) -> int:
    """Where the payload lies in shared memory."""
    return load_64(place + _OFFSET)


assert _CRC + 4 == HEADER_BYTES
assert NO_DTYPE != FLOAT32
