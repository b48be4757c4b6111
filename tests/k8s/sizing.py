"""The sizing table of k8s/README.md, from the published config.json values by the formulas that it shows.

Prints it: `python -m tests.k8s.sizing`. Sizes are decimal: GB is 1e9 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling import host_floor
from tests.model.test_config import V2_LITE, V3

BYTES_OF_AN_ELEMENT = 2  # bfloat16; DeepSeek-V3's FP8 blocks are widened to it
BYTES_OF_A_GATES_ELEMENT = 4  # float32
HOST_SHARE, KV_SHARE = 0.9, 0.8
GPUS_GB = (24, 80, 141)
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
PUBLISHED: Mapping[str, Mapping] = {"DeepSeek-V2-Lite": V2_LITE, "DeepSeek-V2": V2, "DeepSeek-V3": V3}


@dataclass(frozen=True)
class Sizes:
    """Of one checkpoint, in bytes."""

    config: Mapping

    @property
    def num_experts(self) -> int:
        c = self.config
        return (c["num_hidden_layers"] - c["first_k_dense_replace"]) * c["n_routed_experts"]

    @property
    def expert_bytes(self) -> int:
        return 3 * self.config["hidden_size"] * self.config["moe_intermediate_size"] * BYTES_OF_AN_ELEMENT

    @property
    def kv_bytes_per_token(self) -> int:
        c = self.config
        return c["num_hidden_layers"] * (c["kv_lora_rank"] + c["qk_rope_head_dim"]) * BYTES_OF_AN_ELEMENT

    @property
    def dense_bytes(self) -> int:
        c = self.config
        hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
        query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        rank = c["q_lora_rank"]
        attention = (
            (hidden * query if rank is None else rank * (hidden + query))
            + hidden * (latent + c["qk_rope_head_dim"])
            + latent * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
            + heads * c["v_head_dim"] * hidden
        )
        num_dense_layers = c["first_k_dense_replace"]
        num_moe_layers = c["num_hidden_layers"] - num_dense_layers
        shared = 3 * hidden * c["moe_intermediate_size"] * c["n_shared_experts"]
        elements = (
            2 * c["vocab_size"] * hidden
            + c["num_hidden_layers"] * attention
            + num_dense_layers * 3 * hidden * c["intermediate_size"]
            + num_moe_layers * shared
        )
        gates = num_moe_layers * hidden * c["n_routed_experts"]
        return elements * BYTES_OF_AN_ELEMENT + gates * BYTES_OF_A_GATES_ELEMENT

    def slots(self, gpu_gb: int) -> int:
        return int(HOST_SHARE * gpu_gb * 1e9) // self.expert_bytes

    def num_hosts(self, gpu_gb: int, min_replicas: int) -> int:
        return host_floor(self.num_experts, min_replicas, [self.slots(gpu_gb)])

    def kv_tokens(self, gpu_gb: int) -> int:
        return max(0, int(KV_SHARE * (gpu_gb * 1e9 - self.dense_bytes)) // self.kv_bytes_per_token)


def table() -> str:
    """Markdown, a column for each checkpoint."""
    sizes = {name: Sizes(config) for name, config in PUBLISHED.items()}
    rows: list[tuple[str, list[str]]] = [
        ("routed experts", [f"{one.num_experts:,}" for one in sizes.values()]),
        ("bytes per expert", [f"{one.expert_bytes:,}" for one in sizes.values()]),
        ("all experts once", [f"{one.num_experts * one.expert_bytes / 1e9:,.0f} GB" for one in sizes.values()]),
        *((f"slots of a host, GPU of {gpu} GB", [f"{one.slots(gpu):,}" for one in sizes.values()]) for gpu in GPUS_GB),
        *(
            (
                f"expert hosts at least, {gpu} GB, `min_replicas` 1 / 2",
                [f"{one.num_hosts(gpu, 1)} / {one.num_hosts(gpu, 2)}" for one in sizes.values()],
            )
            for gpu in GPUS_GB
        ),
        ("dense part, on every router", [f"{one.dense_bytes / 1e9:.1f} GB" for one in sizes.values()]),
        ("KV cache per token", [f"{one.kv_bytes_per_token:,} bytes" for one in sizes.values()]),
        *((f"tokens in a router's cache, GPU of {gpu} GB", [tokens(one.kv_tokens(gpu)) for one in sizes.values()]) for gpu in GPUS_GB),
    ]
    lines = [f"| | {' | '.join(sizes)} |", f"| --- |{' ---: |' * len(sizes)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def tokens(count: int) -> str:
    """Rounded down to thousands; a router whose dense part does not fit has none."""
    return f"{count // 1000 * 1000:,}" if count > 0 else "does not fit"


if __name__ == "__main__":
    print(table())
