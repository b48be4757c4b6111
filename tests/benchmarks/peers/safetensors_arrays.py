"""A safetensors checkpoint as NumPy arrays, for an environment that has neither torch nor a NumPy of bfloat16."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Arrays(Mapping[str, NDArray[np.float32]]):
    """Tensors by name, read from the mapped file when asked for."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with file.open("rb") as opened:
                header_bytes = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(header_bytes))
            header.pop("__metadata__", None)
            self._places.update({name: (file, 8 + header_bytes, entry) for name, entry in header.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """In float32. ValueError for a dtype other than BF16 and F32."""
        file, data_start, entry = self._places[name]
        start, end = entry["data_offsets"]
        data = np.asarray(np.memmap(file, np.uint8, "r", offset=data_start + start, shape=(end - start,)))
        if entry["dtype"] == "F32":
            values: NDArray[np.float32] = data.view(np.float32)
        elif entry["dtype"] == "BF16":
            values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise ValueError(f"{name} in {file} is {entry['dtype']}")
        return values.reshape(entry["shape"])
