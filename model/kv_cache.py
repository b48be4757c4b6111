"""The paged key/value cache of one router: flat slots per layer; which page belongs to whom is `router.kv_blocks`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheLayout:
    """What one token stores in one layer: the shapes of its entries, the same in every layer.

    MLA: ((kv_lora_rank + rope_dim,),). GQA: ((kv_heads, head_dim), (kv_heads, head_dim)).
    """

    num_layers: int
    entries: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        elements = sum(torch.Size(shape).numel() for shape in self.entries)
        return self.num_layers * elements * self.dtype.itemsize


class PagedCache:
    """num_pages pages of page_size slots; `layers[l][i]` is entry i of layer l, [num_pages * page_size, *shape]."""

    def __init__(self, layout: CacheLayout, num_pages: int, page_size: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.page_size = page_size
        # And written in place, by `model.cpu_rope` and `model.cpu_attention`: float32 in host memory.
        self.is_read_in_place = device.type == "cpu" and layout.dtype == torch.float32
        if self.is_read_in_place:
            from model import cpu_attention, cpu_prefill, cpu_rope, cpu_threads  # bring Numba, for which a router on a GPU has no use

            cpu_attention.prepare_grouped()
            cpu_prefill.prepare()
            cpu_rope.prepare_heads()
            cpu_rope.prepare_latents()
            cpu_threads.prepare()
        self.layers: list[tuple[Tensor, ...]] = [
            tuple(torch.zeros((num_pages * page_size, *shape), dtype=layout.dtype, device=device) for shape in layout.entries)
            for _ in range(layout.num_layers)
        ]

    def write(self, layer: int, slots: Tensor, *entries: Tensor) -> None:
        """Stores each entry [T, *shape] at slots [T]."""
        for stored, entry in zip(self.layers[layer], entries, strict=True):
            stored.index_copy_(0, slots, entry.to(stored.dtype))

    def read(self, layer: int, block_tables: Tensor, length: int) -> tuple[Tensor, ...]:
        """The first `length` tokens of each table in [S, P]: each entry as [S, length, *shape]; past a sequence's end, junk."""
        num_pages = -(-length // self.page_size)
        tables = block_tables[:, :num_pages]
        # Whole pages as rows: index_select copies them two to three times as fast as indexing by the table does.
        return tuple(
            stored.view(self.num_pages, -1)
            .index_select(0, tables.flatten())
            .view(len(tables), num_pages * self.page_size, *stored.shape[1:])[:, :length]
            for stored in self.layers[layer]
        )
