"""Safetensors checkpoints: headers checked first, then exactly the tensors asked for, nothing else read."""

import json
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError
from model.quantization import SCALE_SUFFIX, BlockSize, dequantize, read_block_size
from model.safetensors_header import TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FP8 = "F8_E4M3"
# Of weights that the products of a CPU read as they are stored (`model.cpu_product`, `model.cpu_experts`).
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TensorSource(Protocol):
    """Where an architecture takes its tensors from; a checkpoint, or shapes alone on the `meta` device."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        ...

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the source's device, in the source's compute dtype or `dtype`. CheckpointError on absence or shape."""
        ...

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A weight that is only multiplied with: as `take`, or of a narrower type that products widen exactly."""
        ...

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:
        """Part `index` of a stacked tensor whose whole shape is (num_parts, *shape); only that part is read."""
        ...


class Checkpoint:
    """A directory with model.safetensors, or with shards and model.safetensors.index.json; thread-safe.

    Every header is checked at once; tensors are mapped, and of float32, bfloat16 and float16 ones that already have the wanted
    type and device no copy is made: do not write to them. With dtype None each tensor keeps the type it is stored in (block-scaled
    FP8, which no arithmetic here reads, becomes float32). CheckpointError names file, tensor, expected and found.
    """

    def __init__(self, directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        self._directory = Path(directory)
        self._device = torch.device(device)
        self._dtype = dtype
        self._entries = _read_entries(self._directory)
        self._taken: set[str] = set()
        self._open_files: dict[Path, Any] = {}
        self._opening = threading.Lock()

    def names(self) -> frozenset[str]:
        """Every tensor of the checkpoint."""
        return frozenset(self._entries)

    def unused(self) -> frozenset[str]:
        """The tensors of which nothing has been taken yet; factors count as taken with their FP8 weight."""
        return self.names() - self._taken

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self._entries

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the checkpoint's device, in `dtype` or the checkpoint's. CheckpointError on absence, shape or type."""
        entry = self._entry(name, shape)
        wanted = dtype or self._dtype
        if entry.dtype == _FP8:
            return self._take_fp8(name, entry, wanted or torch.float32)
        _check_float(name, entry)
        return self._place(self._read(name, entry), wanted)

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """As `take`; on a CPU that computes in float32 a half-width weight stays as it is stored: half the bytes, the same products."""
        entry = self._entry(name, shape)
        stays = self._device.type == "cpu" and self._dtype == torch.float32 and entry.dtype in _FLOATS
        return self.take(name, shape, _FLOATS[entry.dtype] if stays else None)

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:
        """Part `index` of a tensor (num_parts, *shape); the other parts are not read. CheckpointError as `take`, and on FP8."""
        assert 0 <= index < num_parts
        entry = self._entry(name, (num_parts, *shape))
        if entry.dtype == _FP8:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected FP8 experts as one tensor each, found them stacked in one")
        _check_float(name, entry)
        return self._place(self._read(name, entry, index), self._dtype)

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._directory}: tensor {name}: expected {list(shape)}, found none in any file")
        if entry.shape != tuple(shape):
            raise CheckpointError(f"{entry.file}: tensor {name}: expected shape {list(shape)}, found {list(entry.shape)}")
        return entry

    def _take_fp8(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        if len(entry.shape) != 2:
            raise CheckpointError(f"{entry.file}: tensor {name}: expected an FP8 weight of two dimensions, found {list(entry.shape)}")
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self._entries:
            raise CheckpointError(f"{entry.file}: tensor {name}: it is FP8; expected its factors in {scale_name}, found none")
        scale = self._entry(scale_name, self._block_size.num_blocks(entry.shape))
        if scale.dtype != "F32":
            raise CheckpointError(f"{scale.file}: tensor {scale_name}: expected dtype F32, found {scale.dtype}")
        weight = self._read(name, entry).to(self._device)
        return dequantize(weight, self._read(scale_name, scale).to(self._device), self._block_size, dtype)

    @cached_property
    def _block_size(self) -> BlockSize:
        return read_block_size(self._directory / "config.json")

    def _read(self, name: str, entry: TensorEntry, part: int | None = None) -> Tensor:
        """The mapped tensor, or one part along its first dimension; its bytes are read when they are first touched."""
        try:
            file = self._open(entry.file)
            tensor: Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name}: the file has changed since it was opened: {error}") from None
        self._taken.add(name)
        return tensor

    def _open(self, path: Path) -> Any:
        with self._opening:
            if path not in self._open_files:
                self._open_files[path] = safe_open(path, framework="pt", device="cpu")
            return self._open_files[path]

    def _place(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        # Moved first, converted there: the narrower type crosses to the device.
        return tensor.to(self._device).to(dtype or tensor.dtype)


def _check_float(name: str, entry: TensorEntry) -> None:
    if entry.dtype not in _FLOATS:
        expected = ", ".join([*_FLOATS, f"{_FP8} with factors"])
        raise CheckpointError(f"{entry.file}: tensor {name}: expected dtype {expected}, found {entry.dtype}")


def _read_entries(directory: Path) -> dict[str, TensorEntry]:
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
    index_file = directory / INDEX_FILE
    if not index_file.is_file():
        raise CheckpointError(f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    tensor_to_shard = _read_index(index_file)
    headers = {shard: read_header(directory / shard) for shard in sorted(set(tensor_to_shard.values()))}
    for name, shard in tensor_to_shard.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{directory / shard}: tensor {name}: expected here by {INDEX_FILE}, found none")
    return {name: headers[shard][name] for name, shard in tensor_to_shard.items()}


def _read_index(index_file: Path) -> dict[str, str]:
    try:
        index = json.loads(index_file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index_file}: expected a JSON object with weight_map, found: {error}") from None
    tensor_to_shard = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(tensor_to_shard, dict) or not tensor_to_shard:
        raise CheckpointError(f"{index_file}: weight_map: expected tensor names with their files, found {tensor_to_shard!r}")
    for name, shard in tensor_to_shard.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index_file}: tensor {name}: expected the name of a file in the same directory, found {shard!r}")
    return tensor_to_shard


def _has_as_the_hub(name: str) -> bool:
    """Checkpoints of the hub: experts in a tensor each, and projections without biases."""
    return not name.endswith(("gate_up_proj", "bias"))


class ShapeSource:
    """Empty tensors of whatever shape is asked for: an architecture without a checkpoint, on the `meta` device.

    `has` decides the optional tensors; by default those of the hub's checkpoints are there: all but names that end in
    `gate_up_proj` (fused experts) or `bias`.
    """

    def __init__(
        self,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
        has: Callable[[str], bool] = _has_as_the_hub,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._has = has

    def has(self, name: str) -> bool:
        """Whether the `has` given at construction says so."""
        return self._has(name)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        """An empty tensor of that shape."""
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def take_matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        """As `take`."""
        return self.take(name, shape)

    def take_part(self, name: str, index: int, num_parts: int, shape: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        """An empty tensor of the part's shape."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)
