import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.weights import Checkpoint, ShapeSource

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_sharded(directory, shards):
    """shards: list of {name: tensor}, one file each, with the index beside them."""
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [directory / file for file in sorted(set(weight_map.values()))]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("compute", [*DTYPES, None])
def test_converts_to_the_compute_dtype_or_keeps_the_storage(tmp_path, stored, compute):
    tensor = torch.randn(5, 3).to(stored)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    taken = Checkpoint(tmp_path, "cpu", compute).take("w", (5, 3))
    assert taken.dtype == (compute or stored)
    assert torch.equal(taken, tensor.to(compute or stored))


def test_a_dtype_asked_for_wins(tmp_path):
    tensor = torch.randn(4).to(torch.bfloat16)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    taken = Checkpoint(tmp_path, "cpu", torch.bfloat16).take("w", (4,), torch.float32)
    assert taken.dtype == torch.float32
    assert torch.equal(taken, tensor.float())


def test_takes_from_every_shard_and_knows_what_is_unused(tmp_path):
    tensors = {name: torch.randn(3, 2) for name in "abcd"}
    write_sharded(tmp_path, [{"a": tensors["a"], "b": tensors["b"]}, {"c": tensors["c"], "d": tensors["d"]}])
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    assert checkpoint.names() == set("abcd")
    assert checkpoint.unused() == set("abcd")
    assert checkpoint.has("d")
    assert not checkpoint.has("e")
    for name in "bd":
        assert torch.equal(checkpoint.take(name, (3, 2)), tensors[name])
    assert checkpoint.unused() == {"a", "c"}


def test_a_single_file_comes_before_an_index(tmp_path):
    write_sharded(tmp_path, [{"a": torch.zeros(1)}])
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).names() == {"b"}


def test_takes_the_parts_of_a_stacked_tensor(tmp_path):
    stacked = torch.randn(4, 3, 2).to(torch.bfloat16)
    save_file({"experts.gate_up_proj": stacked}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    for index in range(4):
        part = checkpoint.take_part("experts.gate_up_proj", index, 4, (3, 2))
        assert part.is_contiguous()
        assert torch.equal(part, stacked[index].float())
    assert checkpoint.unused() == frozenset()


def test_tensors_outlive_the_checkpoint(tmp_path):
    tensor = torch.randn(64, 64)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    taken = checkpoint.take("w", (64, 64))
    del checkpoint
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(taken, tensor)


def test_does_not_read_the_shards_it_takes_nothing_from(tmp_path):
    tensor = torch.randn(8, 8)
    first, second = write_sharded(tmp_path, [{"a": tensor}, {"b": torch.randn(8, 8)}])
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    # Cut to its header after the open: whoever as much as maps this file now fails.
    header_bytes = 8 + int.from_bytes(second.read_bytes()[:8], "little")
    os.truncate(second, header_bytes)
    assert torch.equal(checkpoint.take("a", (8, 8)), tensor)
    assert checkpoint.unused() == {"b"}
    assert first.exists()


def resident_bytes(file):
    """Bytes of the file that this process has touched through its mappings: Rss of /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.partition(" ")[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc to see which pages were touched")
@pytest.mark.parametrize("fused", [True, False])
def test_reads_one_expert_and_not_its_neighbours(tmp_path, fused):
    experts = torch.randn(8, 2048, 1024).to(torch.bfloat16)  # 4 MiB each
    tensors = {"experts": experts} if fused else {f"experts.{e}": experts[e].clone() for e in range(8)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    assert resident_bytes(file) == 0

    def take(expert):
        if fused:
            return checkpoint.take_part("experts", expert, 8, (2048, 1024))
        return checkpoint.take(f"experts.{expert}", (2048, 1024))

    one_expert = experts[0].nbytes
    rounding = 2 * 2**21  # at either end the kernel may map a whole huge page of the page cache
    assert torch.equal(take(4), experts[4].float())
    assert one_expert <= resident_bytes(file) <= one_expert + rounding
    assert torch.equal(take(6), experts[6].float())
    assert 2 * one_expert <= resident_bytes(file) <= 2 * (one_expert + rounding)


def test_no_copy_where_type_and_device_are_right(tmp_path):
    save_file({"w": torch.randn(256, 1024)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    first, second = checkpoint.take("w", (256, 1024)), checkpoint.take("w", (256, 1024))
    assert first.data_ptr() == second.data_ptr()


def test_several_threads_may_take_at_once(tmp_path):
    tensors = {f"t{i}": torch.full((64, 64), float(i)).to(torch.bfloat16) for i in range(64)}
    write_sharded(tmp_path, [dict(list(tensors.items())[i::4]) for i in range(4)])
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    start, wrong = threading.Barrier(4), []

    def take_all(offset):
        start.wait(10)
        for i in range(64):
            name = f"t{(i + offset) % 64}"
            if not torch.equal(checkpoint.take(name, (64, 64)), tensors[name].float()):
                wrong.append(name)

    threads = [threading.Thread(target=take_all, args=(16 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert checkpoint.unused() == frozenset()


def test_shapes_alone():
    source = ShapeSource("meta", torch.bfloat16)
    taken = source.take("w", (3, 4))
    assert (taken.shape, taken.dtype, taken.device.type) == ((3, 4), torch.bfloat16, "meta")
    assert source.take("w", (3,), torch.float32).dtype == torch.float32
    assert source.take_part("experts", 1, 8, (3, 4)).shape == (3, 4)


def test_shapes_alone_have_what_the_hubs_checkpoints_have():
    source = ShapeSource()
    assert source.has("lm_head.weight")
    assert source.has("model.layers.1.mlp.experts.0.gate_proj.weight")
    assert not source.has("model.layers.1.mlp.experts.gate_up_proj")
    assert not source.has("model.layers.1.self_attn.q_proj.bias")
    chosen = ShapeSource(has={"a"}.__contains__)
    assert chosen.has("a")
    assert not chosen.has("b")
