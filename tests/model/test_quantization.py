import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.errors import CheckpointError
from model.quantization import BlockSize, dequantize, read_block_size
from model.weights import Checkpoint

torch.set_num_threads(1)


def reference_dequantize(weight, scale_inv, block):
    """Element by element: value times the factor of the block it lies in."""
    values = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            values[row, column] = weight[row, column].float() * scale_inv[row // block.rows, column // block.columns]
    return values


def random_fp8(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, torch.rand(block.num_blocks((rows, columns)), generator=generator) * 0.01


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.builds(BlockSize, st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_widens_every_element_by_its_blocks_factor(rows, columns, block, seed):
    weight, scale_inv = random_fp8(rows, columns, block, seed)
    expected = reference_dequantize(weight, scale_inv, block)
    assert torch.equal(dequantize(weight, scale_inv, block, torch.float32), expected)
    assert torch.equal(dequantize(weight, scale_inv, block, torch.bfloat16), expected.to(torch.bfloat16))


def test_short_last_blocks_of_deepseek_v3s_size():
    block = BlockSize(128, 128)
    weight, scale_inv = random_fp8(130, 257, block, 1)
    widened = dequantize(weight, scale_inv, block, torch.float32)
    assert scale_inv.shape == (2, 3)
    assert torch.equal(widened[128:, 256:], weight[128:, 256:].float() * scale_inv[1, 2])
    assert torch.equal(widened[:128, 128:256], weight[:128, 128:256].float() * scale_inv[0, 1])


def test_runs_on_the_meta_device():
    weight = torch.empty(6, 8, dtype=torch.float8_e4m3fn, device="meta")
    assert dequantize(weight, torch.empty(2, 2, device="meta"), BlockSize(4, 4), torch.float32).shape == (6, 8)


def write_fp8(directory, block_size=(4, 8), **replaced):
    block = BlockSize(*block_size)
    weight, scale_inv = random_fp8(10, 12, block, 3)
    tensors = {"w.weight": weight, "w.weight_scale_inv": scale_inv, "norm.weight": torch.ones(12, dtype=torch.bfloat16), **replaced}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block_size)}})
    )
    return weight, scale_inv, block


@pytest.mark.parametrize(
    ("compute", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (None, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_a_checkpoint_widens_at_load(tmp_path, compute, asked, expected):
    weight, scale_inv, block = write_fp8(tmp_path)
    checkpoint = Checkpoint(tmp_path, "cpu", compute)
    taken = checkpoint.take("w.weight", (10, 12), asked)
    assert taken.dtype == expected
    assert torch.equal(taken, reference_dequantize(weight, scale_inv, block).to(expected))
    assert checkpoint.unused() == {"norm.weight"}


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"w.weight_scale_inv": None}, "w.weight: it is FP8; expected its factors in w.weight_scale_inv, found none"),
        ({"w.weight_scale_inv": torch.ones(3, 3)}, r"w.weight_scale_inv: expected shape \[3, 2\], found \[3, 3\]"),
        ({"w.weight_scale_inv": torch.ones(3, 2, dtype=torch.bfloat16)}, "w.weight_scale_inv: expected dtype F32, found BF16"),
    ],
)
def test_refuses_missing_or_misshapen_factors(tmp_path, replaced, message):
    write_fp8(tmp_path, **replaced)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path, "cpu", torch.float32).take("w.weight", (10, 12))


def test_refuses_fp8_that_is_not_a_matrix_or_is_stacked(tmp_path):
    stacked = torch.zeros(2, 4, 8, dtype=torch.float8_e4m3fn)
    write_fp8(tmp_path, **{"e.weight": stacked, "e.weight_scale_inv": torch.ones(2, 1, 1)})
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    with pytest.raises(CheckpointError, match=r"e.weight: expected an FP8 weight of two dimensions, found \[2, 4, 8\]"):
        checkpoint.take("e.weight", (2, 4, 8))
    with pytest.raises(CheckpointError, match=r"e.weight: expected FP8 experts as one tensor each, found them stacked in one"):
        checkpoint.take_part("e.weight", 0, 2, (4, 8))


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"quantization_config": {}}',
        '{"quantization_config": {"weight_block_size": [128]}}',
        '{"quantization_config": {"weight_block_size": [0, 128]}}',
        '{"quantization_config": {"weight_block_size": [true, 128]}}',
    ],
)
def test_refuses_a_config_without_a_block_size(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config.json: .*quantization_config"):
        read_block_size(tmp_path / "config.json")
