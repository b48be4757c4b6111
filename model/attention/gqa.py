"""Grouped-query attention (Ainslie et al. 2023): G query heads share each of the KV heads. G = 1 is multi-head attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionPlan, DecodeGroup, PrefillChunk, Span
from model.kv_cache import PagedCache
from model.layers import Linear
from model.rope import Rotation


class GroupedQueryAttention:
    """One layer: `qkv` maps to query heads, key heads and value heads side by side; `out` maps the query heads back."""

    def __init__(self, layer: int, qkv: Linear, out: Linear, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def __call__(self, hidden: Tensor, rotation: Rotation, plan: AttentionPlan, cache: PagedCache) -> Tensor:
        """Writes the keys and values of hidden [T, H] into the cache, attends, returns [T, H]."""
        queries, keys, values = self._place(self.qkv(hidden), rotation, plan, cache)
        if plan.decodes is not None and plan.decodes.rows is None:
            return self.out(self._decode(queries, plan.decodes, cache).flatten(1))
        attended = queries.new_empty(queries.shape)
        if plan.decodes is not None and plan.decodes.rows is not None:
            attended.index_copy_(0, plan.decodes.rows, self._decode(queries[plan.decodes.rows], plan.decodes, cache))
        if cache.is_read_in_place:
            self._prefill_on_cpu(queries, keys, values, plan, cache, attended)
        else:
            for chunk in plan.chunks:
                attended[chunk.rows] = self._prefill(queries, keys, values, chunk, cache)
        return self.out(attended.flatten(1))

    def _place(self, qkv: Tensor, rotation: Rotation, plan: AttentionPlan, cache: PagedCache) -> tuple[Tensor, Tensor, Tensor]:
        """(queries [T, heads, dim], keys [T, kv_heads, dim], values alike); keys and values are in the cache."""
        if cache.is_read_in_place:
            from model import cpu_rope  # brings Numba, for which a router on a GPU has no use

            return cpu_rope.place_heads(qkv, self.num_heads, rotation, plan.slots, *cache.layers[self.layer])
        heads = qkv.view(len(qkv), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        rotated = rotation(heads[:, :num_rotated])
        queries, keys, values = rotated[:, : self.num_heads], rotated[:, self.num_heads :], heads[:, num_rotated:]
        cache.write(self.layer, plan.slots, keys, values)
        return queries, keys, values

    def _decode(self, queries: Tensor, group: DecodeGroup, cache: PagedCache) -> Tensor:
        """[D, heads, dim] of queries [D, heads, dim]. The G query heads of a KV head stand where query tokens would."""
        if cache.is_read_in_place:
            from model import cpu_attention  # brings Numba, for which a router on a GPU has no use

            keys, values = cache.layers[self.layer]
            return cpu_attention.grouped(queries, keys, values, self.head_dim**-0.5, group, cache.page_size)
        keys, values = cache.read(self.layer, group.span.tables, group.span.length)
        grouped = queries.reshape(len(queries), self.num_kv_heads, -1, self.head_dim)
        mask = None if group.mask is None else group.mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        return attended.flatten(1, 2)

    def _prefill(self, queries: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk, cache: PagedCache) -> Tensor:
        """[Q, heads, dim] of one chunk."""
        if chunk.span is None:
            keys, values = keys[chunk.rows], values[chunk.rows]
        else:
            keys, values = self._context(chunk.span, cache)
        attended = F.scaled_dot_product_attention(
            queries[chunk.rows].transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return attended[0].transpose(0, 1)

    def _prefill_on_cpu(
        self, queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, cache: PagedCache, attended: Tensor
    ) -> None:
        """The same of all chunks, into their rows of attended [T, heads, dim]."""
        from model import cpu_prefill  # brings Numba, for which a router on a GPU has no use

        def attend(keys: Tensor, values: Tensor, spans: list[tuple[int, int, int, int]]) -> None:
            heads = cpu_prefill.Heads(queries, queries[..., :0], keys, keys[..., :0], values)
            cpu_prefill.attend_chunks(heads, torch.tensor(spans), self.head_dim**-0.5, plan.window, attended)

        fresh = [chunk for chunk in plan.chunks if chunk.span is None]
        if fresh:
            attend(keys, values, [(chunk.rows.start, chunk.num_queries) * 2 for chunk in fresh])
        for chunk in plan.chunks:
            if chunk.span is not None:
                context = self._context(chunk.span, cache)
                attend(*context, [(chunk.rows.start, chunk.num_queries, 0, chunk.num_keys)])

    def _context(self, span: Span, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """Keys and values [length, kv_heads, dim] of what a chunk attends to."""
        keys, values = (entry[0] for entry in cache.read(self.layer, span.tables, span.length))
        return keys, values
