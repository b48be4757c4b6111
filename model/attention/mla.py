"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token's cache entry is its latent: [kv_lora_rank] compressed keys and values, and [rope_dim] rotated key shared by all heads.
The plain form expands keys and values of the context out of the latents; the absorbed form moves that expansion to the one query
token of a decode, so that keys and values of the context never exist.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionPlan, DecodeGroup, PrefillChunk
from model.kv_cache import PagedCache
from model.layers import Linear, RMSNorm
from model.rope import Rotation
from model.weights import STORED_DTYPES


@dataclass(frozen=True)
class MLADims:
    """Widths of one layer; `nope` and `rope` are the parts of a query or key head without and with position."""

    num_heads: int
    kv_lora_rank: int
    nope: int
    rope: int
    value: int

    @property
    def query(self) -> int:
        """Width of a query head."""
        return self.nope + self.rope

    @property
    def latent(self) -> int:
        """Width of a token's cache entry."""
        return self.kv_lora_rank + self.rope


@dataclass(frozen=True)
class MLAWeights:
    """`down` maps hidden to the query (or, with `query_up`, to its latent of rank query_norm) and the KV latent, side by side.

    `up` is kv_b_proj, from a latent to each head's value and its key without position; `value_up` [heads, value, kv_lora_rank]
    and `key_up` [heads, kv_lora_rank, nope], which is transposed, are its two parts.
    Rows that RoPE turns are de-interleaved.
    """

    down: Linear
    query_norm: RMSNorm | None
    query_up: Linear | None
    latent_norm: RMSNorm
    up: Linear
    key_up: Tensor
    value_up: Tensor
    out: Linear


class LatentAttention:
    """One layer of MLA: absorbed for sequences with one query token, plain for longer chunks."""

    def __init__(self, layer: int, weights: MLAWeights, dims: MLADims, scale: float) -> None:
        self.layer = layer
        self.weights = weights
        self.dims = dims
        self.scale = scale
        if weights.key_up.device.type == "cpu" and weights.key_up.dtype in STORED_DTYPES:
            from model import cpu_attention

            cpu_attention.prepare_latent(weights.key_up.dtype)

    def __call__(self, hidden: Tensor, rotation: Rotation, plan: AttentionPlan, cache: PagedCache) -> Tensor:
        """Writes the latents of hidden [T, H] into the cache, attends, returns [T, H]."""
        weights, dims = self.weights, self.dims
        down = weights.down(hidden)
        query = down[:, : down.shape[1] - dims.latent]
        if weights.query_norm is not None and weights.query_up is not None:
            query = weights.query_up(weights.query_norm(query))
        query_nope, query_rope, latents = self._place(query, down, rotation, plan, cache)
        if plan.decodes is not None and plan.decodes.rows is None:
            return weights.out(self._absorbed(query_nope, query_rope, plan.decodes, cache).flatten(1))
        attended = hidden.new_empty((len(hidden), dims.num_heads, dims.value))
        if plan.decodes is not None and plan.decodes.rows is not None:
            rows = plan.decodes.rows
            attended.index_copy_(0, rows, self._absorbed(query_nope[rows], query_rope[rows], plan.decodes, cache))
        is_fresh = plan.decodes is None and all(chunk.span is None for chunk in plan.chunks)
        expanded = weights.up(latents[:, : dims.kv_lora_rank]) if is_fresh else None  # whole prompts alone: all at once
        if cache.is_read_in_place:
            self._plain_on_cpu(query_nope, query_rope, latents, expanded, plan, cache, attended)
        else:
            for chunk in plan.chunks:
                attended[chunk.rows] = self._plain(query_nope, query_rope, latents, expanded, chunk, cache)
        return weights.out(attended.flatten(1))

    def _place(
        self, query: Tensor, down: Tensor, rotation: Rotation, plan: AttentionPlan, cache: PagedCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(query_nope [T, heads, nope], query_rope [T, heads, rope], latents [T, latent]); the latents are in the cache."""
        dims, norm = self.dims, self.weights.latent_norm
        if cache.is_read_in_place:
            from model import cpu_rope  # brings Numba, for which a router on a GPU has no use

            (stored,) = cache.layers[self.layer]
            return cpu_rope.place_latents(query, down, dims.nope, norm.weight, norm.eps, rotation, plan.slots, stored)
        latent, key_rope = torch.split(down[:, down.shape[1] - dims.latent :], [dims.kv_lora_rank, dims.rope], dim=-1)
        query = query.view(-1, dims.num_heads, dims.query)
        rotated = rotation(torch.cat((query[..., dims.nope :], key_rope.unsqueeze(1)), dim=1))
        latents = torch.cat((norm(latent), rotated[:, dims.num_heads]), dim=-1)
        cache.write(self.layer, plan.slots, latents)
        return query[..., : dims.nope], rotated[:, : dims.num_heads], latents

    def _absorbed(self, query_nope: Tensor, query_rope: Tensor, group: DecodeGroup, cache: PagedCache) -> Tensor:
        """[D, heads, value] of D queries: scores and sums over latents alone."""
        weights = self.weights
        if cache.is_read_in_place:
            from model import cpu_attention  # brings Numba, for which a router on a GPU has no use

            latents = cache.layers[self.layer][0]
            return cpu_attention.latent(
                query_nope, query_rope, weights.key_up, weights.value_up, latents, self.scale, group, cache.page_size
            )
        query_latent = torch.bmm(query_nope.transpose(0, 1), weights.key_up.transpose(1, 2)).transpose(0, 1)
        queries = torch.cat((query_latent, query_rope), dim=-1) * self.scale
        (latents,) = cache.read(self.layer, group.span.tables, group.span.length)
        scores = torch.bmm(queries, latents.transpose(1, 2))
        if group.mask is not None:
            scores.masked_fill_(~group.mask.unsqueeze(1), float("-inf"))
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(latents.dtype)
        summed = torch.bmm(shares, latents[..., : self.dims.kv_lora_rank])
        return torch.bmm(summed.transpose(0, 1), weights.value_up.transpose(1, 2)).transpose(0, 1)

    def _plain(
        self, query_nope: Tensor, query_rope: Tensor, latents: Tensor, expanded: Tensor | None, chunk: PrefillChunk, cache: PagedCache
    ) -> Tensor:
        """[Q, heads, value] of one chunk; keys and values of its context are expanded here, unless all the step's were."""
        dims = self.dims
        latents = self._context(latents, chunk, cache)
        own = self.weights.up(latents[:, : dims.kv_lora_rank]) if expanded is None else expanded[chunk.rows]
        key_nope, values = torch.split(own.view(len(latents), dims.num_heads, -1).transpose(0, 1), [dims.nope, dims.value], dim=-1)
        key_rope = latents[:, dims.kv_lora_rank :]
        keys = torch.cat((key_nope, key_rope.expand(dims.num_heads, -1, -1)), dim=-1)
        queries = torch.cat((query_nope[chunk.rows], query_rope[chunk.rows]), dim=-1).transpose(0, 1)
        # The fused kernels want values as wide as keys; padded they take a third of the time at 512 tokens.
        values = F.pad(values, (0, max(0, self.dims.query - self.dims.value)))
        attended = F.scaled_dot_product_attention(
            queries.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.scale,
        )
        return attended[0, ..., : self.dims.value].transpose(0, 1)

    def _plain_on_cpu(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latents: Tensor,
        expanded: Tensor | None,
        plan: AttentionPlan,
        cache: PagedCache,
        attended: Tensor,
    ) -> None:
        """The same of all chunks, into their rows of attended [T, heads, value]."""
        from model import cpu_prefill  # brings Numba, for which a router on a GPU has no use

        dims = self.dims

        def attend(latents: Tensor, expanded: Tensor, spans: list[tuple[int, int, int, int]]) -> None:
            key_nope, values = torch.split(expanded.view(len(latents), dims.num_heads, -1), [dims.nope, dims.value], dim=-1)
            key_rope = latents[:, dims.kv_lora_rank :].unsqueeze(1)
            heads = cpu_prefill.Heads(query_nope, query_rope, key_nope, key_rope, values)
            cpu_prefill.attend_chunks(heads, torch.tensor(spans), self.scale, plan.window, attended)

        if expanded is not None:
            attend(latents, expanded, [(chunk.rows.start, chunk.num_queries) * 2 for chunk in plan.chunks])
            return
        for chunk in plan.chunks:
            context = self._context(latents, chunk, cache)
            up = self.weights.up(context[:, : dims.kv_lora_rank])
            attend(context, up, [(chunk.rows.start, chunk.num_queries, 0, chunk.num_keys)])

    def _context(self, latents: Tensor, chunk: PrefillChunk, cache: PagedCache) -> Tensor:
        """Latents [length, latent] of what a chunk attends to."""
        span = chunk.span
        return latents[chunk.rows] if span is None else cache.read(self.layer, span.tables, span.length)[0][0]
