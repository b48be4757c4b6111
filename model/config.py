"""What the rest of Shoal needs to know of a checkpoint, whatever its family. Families add their own fields."""

from pydantic import BaseModel, ConfigDict


class ModelConfig(BaseModel):
    """A family's config.json, checked: every key either used exactly or refused by name."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts; empty for a dense model."""
        return ()

    @property
    def num_routed_experts(self) -> int:
        """Routed experts in each MoE layer (E); 0 for a dense model."""
        return 0

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts chosen for each token (K); 0 for a dense model."""
        return 0

    @property
    def moe_intermediate_size(self) -> int:
        """Inner width of a routed expert (I); 0 for a dense model."""
        return 0
