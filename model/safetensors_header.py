"""The header of one safetensors file, read and checked without touching the tensors behind it.

Layout (github.com/huggingface/safetensors, README): 8 bytes little-endian header length N, N bytes of JSON that map each
tensor's name to its dtype, shape and data_offsets, then the data, with no gap and no overlap.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

from model.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # what the safetensors library itself refuses to go past
_DTYPES_BY_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
_BITS = {dtype: bits for bits, dtypes in _DTYPES_BY_BITS.items() for dtype in dtypes}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor; `dtype` in safetensors' spelling (F32, BF16, F8_E4M3, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of the file by name. CheckpointError if the file is missing, truncated or its header misshapen."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: truncated: expected a header of 8 + {length} bytes, found {size} bytes in all; fetch it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {length}")
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected a safetensors file, found none; fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: expected a readable safetensors file, found: {error.strerror}") from None
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: expected a header in JSON, found: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: expected a header that is a JSON object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    _check_offsets(file, header, size - 8 - length)
    return {name: TensorEntry(file, fields["dtype"], tuple(fields["shape"])) for name, fields in header.items()}


def _check_offsets(file: Path, header: dict[str, object], data_bytes: int) -> None:
    spans = sorted((*_check_entry(file, name, fields), name) for name, fields in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise CheckpointError(f"{file}: tensor {name}: expected its data to begin at byte {end}, found {start}: a gap or an overlap")
        if stop > data_bytes:
            raise CheckpointError(
                f"{file}: tensor {name}: truncated: expected data up to byte {stop}, found {data_bytes} bytes of data; fetch it again"
            )
        end = stop
    if end != data_bytes:
        raise CheckpointError(f"{file}: expected {end} bytes of data, found {data_bytes}: bytes that no tensor owns")


def _check_entry(file: Path, name: str, fields: object) -> tuple[int, int]:
    where = f"{file}: tensor {name}"
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {fields!r}")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: expected a dtype of safetensors, found {dtype!r}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: expected a shape of non-negative integers, found {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: expected data_offsets [begin, end], found {offsets!r}")
    expected = prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(f"{where}: {dtype} {list(shape)} should take {expected} bytes, its offsets span {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1]


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
