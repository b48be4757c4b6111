"""Every way a checkpoint can be bad is a CheckpointError that names file, tensor, what was expected and what was found."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from model.errors import CheckpointError
from model.safetensors_header import read_header
from model.weights import Checkpoint

torch.set_num_threads(1)
SHARD = "model-00001-of-00002.safetensors"


def write_file(file, header, data=b""):
    """A safetensors file with whatever header: JSON of a value, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_sharded(directory, index=None):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, directory / SHARD)
    save_file({"c": torch.zeros(5)}, directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": SHARD, "b": SHARD, "c": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index or {"weight_map": weight_map}))


def refusal(directory):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert caught.value.kind == "bad_checkpoint"
    return str(caught.value)


def test_an_empty_or_missing_directory(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: expected model.safetensors or model.safetensors.index.json, found neither"
    assert "found neither" in refusal(tmp_path / "nowhere")


def test_a_missing_shard(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / SHARD).unlink()
    assert refusal(tmp_path) == f"{tmp_path / SHARD}: expected a safetensors file, found none; fetch it again"


def test_a_shard_that_is_a_directory(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / SHARD).unlink()
    (tmp_path / SHARD).mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path / SHARD}: expected a readable safetensors file, found: ")


def test_a_tensor_that_the_index_promises_and_its_shard_lacks(tmp_path):
    write_sharded(tmp_path, {"weight_map": {"a": SHARD, "z": SHARD}})
    assert refusal(tmp_path) == f"{tmp_path / SHARD}: tensor z: expected here by model.safetensors.index.json, found none"


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "expected a JSON object with weight_map"),
        ("[1]", "weight_map: expected tensor names with their files, found None"),
        ('{"weight_map": {}}', "weight_map: expected tensor names with their files, found {}"),
        ('{"weight_map": {"a": 3}}', "tensor a: expected the name of a file in the same directory, found 3"),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            "tensor a: expected the name of a file in the same directory, found '../x.safetensors'",
        ),
    ],
)
def test_a_misshapen_index(tmp_path, index, complaint):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'model.safetensors.index.json'}: ")
    assert complaint in message


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_truncated_anywhere(tmp_path_factory, cut):
    directory = tmp_path_factory.mktemp("cut")
    whole = save({"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.randn(2, 2, 2).bfloat16()})
    file = directory / "model.safetensors"
    file.write_bytes(whole[: cut % len(whole)])
    message = refusal(directory)
    assert message.startswith(f"{file}: ")
    assert "truncated" in message


def test_truncation_names_the_tensor_and_both_sizes(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(16), "b": torch.zeros(16)}, file)
    os.truncate(file, file.stat().st_size - 4)
    assert refusal(tmp_path) == f"{file}: tensor b: truncated: expected data up to byte 128, found 124 bytes of data; fetch it again"


def test_a_header_longer_than_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    assert refusal(tmp_path) == f"{file}: truncated: expected a header of 8 + {2**40} bytes, found 10 bytes in all; fetch it again"


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"not json", "expected a header in JSON"),
        (b"\xff\xfe\x00", "expected a header in JSON"),
        ([], "expected a header that is a JSON object, found list"),
        ({"a": 1}, "tensor a: expected dtype, shape and data_offsets, found 1"),
        ({"a": {**ENTRY, "dtype": "F33"}}, "tensor a: expected a dtype of safetensors, found 'F33'"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "tensor a: expected a dtype of safetensors, found ['F32']"),
        ({"a": {**ENTRY, "shape": [-2]}}, "tensor a: expected a shape of non-negative integers, found [-2]"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "tensor a: expected a shape of non-negative integers, found [2.0]"),
        ({"a": {**ENTRY, "shape": None}}, "tensor a: expected a shape of non-negative integers, found None"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "tensor a: expected data_offsets [begin, end], found [0]"),
        ({"a": {**ENTRY, "data_offsets": "08"}}, "tensor a: expected data_offsets [begin, end], found '08'"),
        ({"a": {**ENTRY, "shape": [3]}}, "tensor a: F32 [3] should take 12 bytes, its offsets span 8"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "tensor a: F32 [2] should take 8 bytes, its offsets span -8"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, "tensor a: expected its data to begin at byte 0, found 4: a gap or an overlap"),
        ({"a": ENTRY, "b": ENTRY}, "tensor b: expected its data to begin at byte 8, found 0: a gap or an overlap"),
        ({}, "expected 0 bytes of data, found 8: bytes that no tensor owns"),
    ],
)
def test_a_misshapen_header(tmp_path, header, complaint):
    file = tmp_path / "model.safetensors"
    write_file(file, header, bytes(8))
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: ")
    assert complaint in message


def test_a_header_past_the_librarys_limit(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)  # sparse: takes no disk
    assert refusal(tmp_path) == f"{file}: expected a header of at most 100000000 bytes, found 100000001"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20) | st.text(max_size=4) | st.sampled_from(["F32", "BF16", "I64"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(header=st.binary(max_size=40) | st.dictionaries(st.text(max_size=3), json_values, max_size=3), data=st.binary(max_size=40))
def test_any_header_is_read_or_refused(tmp_path_factory, header, data):
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    write_file(file, header, data)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)  # noqa: PT017
    else:
        assert all(entry.file == file and isinstance(entry.shape, tuple) for entry in entries.values())


def test_empty_and_scalar_tensors_are_fine(tmp_path):
    save_file({"a": torch.zeros(0, 3), "b": torch.tensor(2.0), "c": torch.zeros(0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "cpu", torch.float32)
    assert checkpoint.take("a", (0, 3)).shape == (0, 3)
    assert checkpoint.take("b", ()) == 2.0


def test_a_tensor_that_is_nowhere(tmp_path):
    write_sharded(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor z: expected \[2, 3\], found none in any file") as caught:
        Checkpoint(tmp_path).take("z", (2, 3))
    assert str(tmp_path) in str(caught.value)


def test_a_misshapen_tensor(tmp_path):
    write_sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.take("a", (3, 2))
    assert str(caught.value) == f"{tmp_path / SHARD}: tensor a: expected shape [3, 2], found [2, 3]"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.take_part("a", 0, 3, (3,))
    assert str(caught.value) == f"{tmp_path / SHARD}: tensor a: expected shape [3, 3], found [2, 3]"
    assert checkpoint.unused() == checkpoint.names()


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(torch.int64, "I64"), (torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float64, "F64"), (torch.float8_e5m2, "F8_E5M2")],
)
def test_a_wrong_dtype(tmp_path, dtype, found):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 2).to(dtype)}, file)
    checkpoint = Checkpoint(tmp_path)
    for take in (lambda: checkpoint.take("a", (2, 2)), lambda: checkpoint.take_part("a", 0, 2, (2,))):
        with pytest.raises(CheckpointError) as caught:
            take()
        assert str(caught.value) == f"{file}: tensor a: expected dtype F32, BF16, F16, F8_E4M3 with factors, found {found}"


def test_a_file_replaced_after_the_open(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    checkpoint = Checkpoint(tmp_path)
    save_file({"b": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="tensor a: the file has changed since it was opened"):
        checkpoint.take("a", (2,))
