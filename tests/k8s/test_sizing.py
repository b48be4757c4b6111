"""The sizing table in k8s/README.md is recomputed, and its formulas give what the product itself would load."""

import json
from pathlib import Path

import pytest
import torch

from actors.router import GPU_KV_CACHE_SHARE
from model.architectures import build, load_expert, read_config
from model.loading import logical_experts
from model.weights import ShapeSource
from tests.k8s.sizing import KV_SHARE, PUBLISHED, Sizes, table

README = Path(__file__).resolve().parents[2] / "k8s" / "README.md"
BEGIN, END = "<!-- sizing: python -m tests.k8s.sizing -->", "<!-- end of sizing -->"


class Counted(ShapeSource):
    """Adds up the bytes of what is taken."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.bfloat16)
        self.num_bytes = 0

    def take(self, name, shape, dtype=None):
        tensor = super().take(name, shape, dtype)
        self.num_bytes += tensor.nbytes
        return tensor


def test_the_table_is_what_the_formulas_give():
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_formulas_are_those_of_the_product(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config, source, sizes = read_config(tmp_path), Counted(), Sizes(PUBLISHED[name])
    experts = logical_experts(config)
    assert len(experts) == sizes.num_experts
    expert = load_expert(config, ShapeSource(dtype=torch.bfloat16), experts[0])
    assert expert.gate_up.nbytes + expert.down.nbytes == sizes.expert_bytes
    model = build(config, source)
    assert model.cache_layout.bytes_per_token == sizes.kv_bytes_per_token
    assert source.num_bytes == pytest.approx(sizes.dense_bytes, rel=0.001)  # norms and biases
    assert KV_SHARE == GPU_KV_CACHE_SHARE
