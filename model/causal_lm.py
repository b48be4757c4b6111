"""What every architecture offers to the engine: one protocol, so that nothing above this package knows a family."""

from typing import Protocol

from torch import Tensor

from model.batch import Batch, ForwardPass
from model.config import ModelConfig
from model.gate import Gate
from model.kv_cache import CacheLayout, PagedCache


class CausalLM(Protocol):
    """The dense part of a checkpoint on one device. Stateless between steps: the cache is the engine's."""

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's."""
        ...

    @property
    def cache_layout(self) -> CacheLayout:
        """What a token stores in each layer."""
        ...

    def gate(self, layer: int) -> Gate:
        """The gate of a layer in `config.moe_layers`."""
        ...

    def forward(self, batch: Batch, cache: PagedCache) -> ForwardPass:
        """Writes the batch's tokens into the cache, attends to each sequence's pages, returns logits [R, V] float32."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings [T, H]."""
        ...
