"""Payloads: the tensors of requests and answers as contiguous bytes, and as views of bytes that have arrived."""

import functools
import mmap
import zlib
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from router.errors import FrameError
from router.placement_map import MapVersion
from router.transport.frames import (
    DTYPE_CODES,
    HIDDEN_DTYPES,
    IS_PREFILL,
    MAX_REASON_BYTES,
    SHARED,
    Bytes,
    ExpertsAnswer,
    ExpertsRequest,
    FrameKind,
    Header,
    Sizes,
    pack_header,
    payload_layout,
)

# What tensors can be views of: never `bytes`, which torch would have to trust nobody to write to.
WritableBytes: TypeAlias = bytearray | memoryview | mmap.mmap

_PADDING = bytes(4)
MAX_PLACES = 256


class RequestSizes(NamedTuple):
    """What the shapes and types of a request's tensors come to: bytes of its payload, and with room for its answer in shared memory."""

    tensors: Sizes
    num_bytes: int
    shared_bytes: int


def sizes_of(request: ExpertsRequest) -> RequestSizes:
    """FrameError names the tensor that has no place in a frame."""
    hidden, expert_ids, weights = request.hidden, request.expert_ids, request.weights
    return _sizes_of(hidden.shape, hidden.dtype, expert_ids.shape, expert_ids.dtype, weights.shape, weights.dtype)


@functools.lru_cache(1024)  # a decode step's are the same again and again
def _sizes_of(
    hidden: torch.Size, hidden_dtype: torch.dtype, ids: torch.Size, ids_dtype: torch.dtype, weights: torch.Size, weights_dtype: torch.dtype
) -> RequestSizes:
    if len(hidden) != 2 or len(ids) != 2 or ids != weights or hidden[0] != ids[0]:
        shapes = f"hidden {list(hidden)}, expert_ids {list(ids)}, weights {list(weights)}"
        raise FrameError(f"{shapes}: they must be [T, H], [T, K] and [T, K]")
    if ids_dtype != torch.int16 or weights_dtype != torch.float32:
        raise FrameError(f"expert_ids must be int16 and weights float32, not {ids_dtype} and {weights_dtype}")
    dtype = DTYPE_CODES.get(hidden_dtype)
    if dtype is None:
        raise FrameError(f"hidden must be one of {list(DTYPE_CODES)}, not {hidden_dtype}")
    (num_tokens, hidden_size), top_k = hidden, ids[1]
    if not (num_tokens and hidden_size and top_k):
        raise FrameError(f"an EXPERTS frame carries at least one token and one expert: T={num_tokens}, H={hidden_size}, K={top_k}")
    sizes = Sizes(num_tokens, hidden_size, top_k, dtype)
    return RequestSizes(sizes, _num_bytes_of(*sizes), shared_bytes_of(*sizes)[1])


def request_header(incarnation: int, sequence: int, attempt: int, request: ExpertsRequest) -> Header:
    """The header of an EXPERTS frame, without the payload's place. FrameError names the tensor that has no place in a frame."""
    sizes = sizes_of(request)
    return Header(
        FrameKind.EXPERTS,
        incarnation,
        sequence,
        attempt,
        request.map_version.epoch,
        request.map_version.n,
        request.layer,
        *sizes.tensors,
        IS_PREFILL if request.is_prefill else 0,
        0,
        sizes.num_bytes,
    )


def encode_request(incarnation: int, sequence: int, attempt: int, request: ExpertsRequest) -> list[Bytes]:
    """The frame as the buffers to write one after another; tensors on the CPU are not copied."""
    header = request_header(incarnation, sequence, attempt, request)
    hidden = _bytes_of(request.hidden)
    parts: list[Bytes] = [hidden, _PADDING[: -len(hidden) % 4], _bytes_of(request.weights), _bytes_of(request.expert_ids)]
    return [pack_header(header._replace(payload_crc=_crc_of(parts))), *parts]


class Place:
    """One request in a shared buffer, and the room for its answer, as views: the fields of an EXPERTS and of a PARTIAL frame.

    `told` are the last fields of the PARTIAL frame's header, from `map_epoch` on: the same for every answer that lies here.
    """

    def __init__(self, request: ExpertsRequest, partial: Tensor, answer_offset: int) -> None:
        self.hidden, self.expert_ids, self.weights, self.partial = request.hidden, request.expert_ids, request.weights, partial
        self.answer_offset = answer_offset
        num_tokens, hidden_size = partial.shape
        dtype = DTYPE_CODES[torch.float32]
        self.told = (0, 0, 0, num_tokens, hidden_size, 0, dtype, SHARED, answer_offset, num_tokens * hidden_size * 4, 0)

    def write(self, request: ExpertsRequest) -> None:
        """Lays the request's tensors here, from whatever device they are on."""
        self.hidden.copy_(request.hidden)
        self.expert_ids.copy_(request.expert_ids)
        self.weights.copy_(request.weights)


class Places:
    """The places of one shared buffer. A steady load meets the same few again and again: their views are kept."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._places: dict[tuple[int, tuple[int, ...]], Place] = {}

    def at(self, offset: int, sizes: tuple[int, ...]) -> Place:
        """Where a request of these `Sizes` lies, and its answer; the sizes are checked ones. FrameError outside the buffer."""
        key = offset, sizes
        place = self._places.get(key)
        if place is None:
            num_tokens, hidden_size, top_k, dtype = sizes
            answer_offset, num_bytes = shared_bytes_of(num_tokens, hidden_size, top_k, dtype)
            if offset % 64 or offset + num_bytes > len(self._buffer):
                room = f"the shared buffer of {len(self._buffer)} bytes"
                raise FrameError(f"a request at {offset} with room for its answer is not inside {room}")
            header = Header(FrameKind.EXPERTS, 0, 0, 0, 0, 0, 0, num_tokens, hidden_size, top_k, dtype)
            partial = _matrix(self._buffer, torch.float32, num_tokens, hidden_size, offset + answer_offset)
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            place = self._places[key] = Place(view_request(header, self._buffer, offset), partial, offset + answer_offset)
        return place


def view_request(header: Header, buffer: WritableBytes, offset: int = 0) -> ExpertsRequest:
    """The request that lies in `buffer` at `offset`, as views of it. The header is a checked one."""
    dtype = HIDDEN_DTYPES[header.dtype]
    num_tokens, hidden_size, top_k = header.num_tokens, header.hidden_size, header.top_k
    layout = payload_layout(num_tokens, hidden_size, top_k, dtype.itemsize)
    return ExpertsRequest(
        layer=header.layer,
        map_version=MapVersion(header.map_epoch, header.map_n),
        hidden=torch.frombuffer(buffer, dtype=dtype, count=num_tokens * hidden_size, offset=offset).view(num_tokens, hidden_size),
        expert_ids=_matrix(buffer, torch.int16, num_tokens, top_k, offset + layout.expert_ids_offset),
        weights=_matrix(buffer, torch.float32, num_tokens, top_k, offset + layout.weights_offset),
        is_prefill=bool(header.flags & IS_PREFILL),
    )


def partial_header(incarnation: int, answer: ExpertsAnswer) -> Header:
    """The header of a PARTIAL frame, without the payload's place. FrameError unless partial is [T, H] float32."""
    partial = answer.partial
    if partial is None or partial.dim() != 2 or not partial.numel() or partial.dtype != torch.float32:
        found = "None" if partial is None else f"{list(partial.shape)} {partial.dtype}"
        raise FrameError(f"a PARTIAL answer needs a partial sum [T, H] float32, not {found}")
    num_tokens, hidden_size = partial.shape
    return Header(
        FrameKind.PARTIAL,
        incarnation,
        answer.sequence,
        answer.attempt,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        dtype=DTYPE_CODES[torch.float32],
        length=num_tokens * hidden_size * 4,
    )


def encode_answer(incarnation: int, answer: ExpertsAnswer) -> list[Bytes]:
    """The frame as the buffers to write one after another; a reason longer than the limit is cut."""
    if answer.kind == FrameKind.PARTIAL:
        header = partial_header(incarnation, answer)
        assert answer.partial is not None
        payload: Bytes = _bytes_of(answer.partial)
    else:
        payload = answer.reason.encode()[:MAX_REASON_BYTES]
        header = Header(answer.kind, incarnation, answer.sequence, answer.attempt, length=len(payload))
    return [pack_header(header._replace(payload_crc=zlib.crc32(payload))), payload]


def view_answer(header: Header, buffer: WritableBytes, offset: int = 0) -> ExpertsAnswer:
    """The answer that lies in `buffer` at `offset`; its partial sum is a view. The header is a checked one."""
    if header.kind == FrameKind.PARTIAL:
        partial = _matrix(buffer, torch.float32, header.num_tokens, header.hidden_size, offset)
        return ExpertsAnswer(header.sequence, header.attempt, FrameKind.PARTIAL, partial)
    reason = bytes(memoryview(buffer)[offset : offset + header.length]).decode(errors="replace")
    return ExpertsAnswer(header.sequence, header.attempt, FrameKind(header.kind), None, reason)


def shared_bytes_of(num_tokens: int, hidden_size: int, top_k: int, dtype: int) -> tuple[int, int]:
    """Of an EXPERTS frame in shared memory: where its answer lies from its start on, and the bytes of both together."""
    answer_offset = (_num_bytes_of(num_tokens, hidden_size, top_k, dtype) + 63) & ~63
    return answer_offset, answer_offset + num_tokens * hidden_size * 4


def _num_bytes_of(num_tokens: int, hidden_size: int, top_k: int, dtype: int) -> int:
    return payload_layout(num_tokens, hidden_size, top_k, HIDDEN_DTYPES[dtype].itemsize).num_bytes


def is_shared(header: Header) -> bool:
    """Whether the payload lies in the shared buffer and does not follow in the stream."""
    return bool(header.flags & SHARED)


def _matrix(buffer: WritableBytes, dtype: torch.dtype, rows: int, columns: int, offset: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def _bytes_of(tensor: Tensor) -> memoryview:
    contiguous = tensor.detach().to("cpu").contiguous()
    return contiguous.view(torch.uint8).numpy().data.cast("B")


def _crc_of(parts: list[Bytes]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
