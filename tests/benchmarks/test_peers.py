"""The pure parts of tests/benchmarks/peers: what is read off a stream, what agrees, how tensors are laid out, what the tables say."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.benchmarks.peers import floors
from tests.benchmarks.peers.agreement import Agreement, GreedyAnswer, agreement
from tests.benchmarks.peers.checkpoints import MIXTRAL, VOCAB_SIZE, text_vocabulary
from tests.benchmarks.peers.environments import needed_requirements
from tests.benchmarks.peers.gguf_tensors import converted, interleaved
from tests.benchmarks.peers.load import Answered, answered
from tests.benchmarks.peers.measures import Round, measured, percentile
from tests.benchmarks.peers.safetensors_arrays import Arrays
from tests.benchmarks.peers.side_run import Result
from tests.benchmarks.peers.sides import SIDES, chosen
from tests.benchmarks.peers.sse import body_of, events_of, status_of
from tests.benchmarks.peers.table import ratios_table, results_table
from tests.benchmarks.peers.workload import DECODE, PREFILL

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def event(payload):
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def token(text, finish=None):
    return event({"choices": [{"text": text, "finish_reason": finish}]})


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class TestStream:
    def test_an_event_has_come_when_its_last_byte_has_however_chunks_and_reads_cut_it(self):
        first, second = token("a"), token("b", "length")
        framed = chunk(first[:9]) + chunk(first[9:] + second) + chunk(event(USAGE) + b"data: [DONE]\n\n") + b"0\r\n\r\n"
        stream = HEAD + b"transfer-encoding: chunked\r\n\r\n" + framed
        for size in (1, 7, 64, len(stream)):
            reads = [(float(start + size), stream[start : start + size]) for start in range(0, len(stream), size)]
            answer = answered(0.5, reads)
            last_of_second_chunk = stream.index(chunk(first[9:] + second)) + len(chunk(first[9:] + second)) - 2
            expected = -(-last_of_second_chunk // size) * size
            assert answer.token_s == (expected, expected)
            assert (answer.num_tokens, answer.sent_s, answer.done_s) == (2, 0.5, reads[-1][0])

    def test_a_body_without_chunks_is_timed_read_by_read(self):
        reads = [
            (1.0, HEAD + b"\r\n"),
            (2.0, token("a")[:8]),
            (3.0, token("a")[8:]),
            (4.0, token("b") + event(USAGE)),
            (5.0, b"data: [DONE]\n\n"),
        ]
        assert answered(0.0, reads).token_s == (3.0, 4.0)
        assert [at for at, _ in body_of(reads)] == [2.0, 3.0, 4.0, 5.0]

    def test_an_event_that_only_ends_the_answer_brings_no_token(self):
        stream = HEAD + b"\r\n" + token("a") + token("", "length") + event(USAGE) + b"data: [DONE]\n\n"
        assert len(answered(0.0, [(1.0, stream)]).token_s) == 1

    def test_a_token_without_text_yet_is_one(self):
        stream = HEAD + b"\r\n" + token("") + token("ab", "length") + event(USAGE) + b"data: [DONE]\n\n"
        assert len(answered(0.0, [(1.0, stream)]).token_s) == 2

    @pytest.mark.parametrize(
        ("stream", "says"),
        [
            (b"HTTP/1.1 503 Busy\r\n\r\nno room", "status 503: no room"),
            (HEAD + b"\r\n" + token("a"), "ended before"),
            (HEAD + b"\r\n" + event({"error": {"message": "lost"}}), "lost"),
            (HEAD + b"\r\n" + token("a") + b"data: [DONE]\n\n", "no usage"),
        ],
    )
    def test_half_an_answer_is_none(self, stream, says):
        with pytest.raises(ValueError, match=says):
            answered(0.0, [(1.0, stream)])

    def test_status(self):
        assert status_of([(0.0, b"HTTP/1.1 "), (0.1, b"404 Not Found\r\n")]) == 404
        assert events_of([(0.0, HEAD + b"\r\ndata: [DONE]\n\n")]) == []


class TestMeasures:
    @pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.001, 1.0)])
    def test_percentile(self, share, value):
        assert percentile([float(number) for number in range(100, 0, -1)], share) == value

    def test_rates_count_from_the_first_request_to_the_last_answer(self):
        answers = [Answered(10.0, (11.0, 12.0), 12.0, 2), Answered(10.5, (11.5, 14.5), 15.0, 2)]
        found = measured(answers, prompt_tokens=10, output_tokens=2)
        assert found == Round(output_per_s=4 / 5, prompt_per_s=4.0, itl_p50_s=1.0, itl_p99_s=3.0, ttft_p50_s=1.0)

    def test_an_answer_of_another_length_is_an_error(self):
        with pytest.raises(ValueError, match="1 of 2 answers have not 2 tokens; the first has 1"):
            measured([Answered(0.0, (1.0,), 1.0, 2), Answered(0.0, (1.0,), 1.0, 1)], 4, 2)


class TestAgreement:
    ORACLE = (GreedyAnswer((1,), (5, 6, 7, 8), (0.5, 0.5, 0.0005, 0.5)), GreedyAnswer((2,), (9, 9, 9, 9), (0.5, 0.5, 0.5, 0.5)))

    def test_from_the_first_tie_on_nothing_is_compared(self):
        assert agreement(self.ORACLE, [(5, 6, 1, 2), (9, 9, 9, 9)]) == Agreement(6, 6)
        assert agreement(self.ORACLE, [(5, 6, 1, 2), (9, 9, 9, 9)]).counts

    def test_what_follows_the_first_difference_agrees_by_chance_and_does_not_count(self):
        found = agreement(self.ORACLE, [(5, 6, 7, 8), (9, 1, 9, 9)])
        assert (str(found), found.counts) == ("3 of 6", False)

    def test_a_short_answer_does_not_count(self):
        assert agreement(self.ORACLE, [(5, 6, 7, 8), (9, 9)]) == Agreement(4, 6)


class TestGguf:
    def test_rotated_pairs_come_side_by_side_in_each_head(self):
        rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)
        assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

    def test_the_turned_product_is_that_of_the_pairs_half_a_head_apart(self):
        random = np.random.default_rng(0)
        weight, hidden = random.standard_normal((8, 5), dtype=np.float32), random.standard_normal(5, dtype=np.float32)
        apart = weight @ hidden
        beside = interleaved(weight, 1) @ hidden
        assert np.array_equal(beside[0::2], apart[:4])
        assert np.array_equal(beside[1::2], apart[4:])

    def test_mixtral(self):
        config = {"model_type": "mixtral", "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 4}
        layer = "model.layers.3."
        names = ["lm_head.weight", f"{layer}self_attn.k_proj.weight", f"{layer}input_layernorm.weight"]
        names += [f"{layer}block_sparse_moe.experts.{expert}.{part}.weight" for expert in (1, 0) for part in ("w1", "w2", "w3")]
        tensors = {name: np.full((4, 4), float(number), dtype=np.float32) for number, name in enumerate(names)}
        found = dict(converted(tensors, tensors, config))
        assert set(found) == {"output.weight", "blk.3.attn_k.weight", "blk.3.attn_norm.weight"} | {
            f"blk.3.ffn_{part}_exps.weight" for part in ("gate", "up", "down")
        }
        assert found["blk.3.ffn_gate_exps.weight"][:, 0, 0].tolist() == [6, 3]  # by expert, in whichever order the file has them
        assert found["blk.3.ffn_down_exps.weight"][:, 0, 0].tolist() == [7, 4]
        assert found["blk.3.ffn_up_exps.weight"][:, 0, 0].tolist() == [8, 5]

    def test_deepseek_absorbs_what_lies_between_latent_and_heads(self):
        config = {"model_type": "deepseek_v2", "num_attention_heads": 2, "qk_nope_head_dim": 3, "v_head_dim": 4, "hidden_size": 6}
        random = np.random.default_rng(0)
        name, q_name = "model.layers.0.self_attn.kv_b_proj.weight", "model.layers.0.self_attn.q_proj.weight"
        tensors = {name: random.standard_normal((14, 5), dtype=np.float32), q_name: random.standard_normal((10, 6), dtype=np.float32)}
        found = dict(converted(tensors, tensors, config))
        latent = random.standard_normal(5, dtype=np.float32)
        whole = (tensors[name] @ latent).reshape(2, 7)
        np.testing.assert_allclose(np.einsum("hln,l->hn", found["blk.0.attn_k_b.weight"], latent), whole[:, :3], rtol=1e-5)
        np.testing.assert_allclose(found["blk.0.attn_v_b.weight"] @ latent, whole[:, 3:], rtol=1e-5)
        assert np.array_equal(found["blk.0.attn_q_a.weight"], np.eye(6))
        assert np.array_equal(found["blk.0.attn_q_b.weight"], tensors[q_name])

    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.visual.weight"])
    def test_a_tensor_without_a_place_is_an_error(self, name):
        with pytest.raises(ValueError, match="has no place"):
            dict(converted([name], {name: np.zeros(1, dtype=np.float32)}, {"model_type": "mixtral"}))


class TestWorkload:
    def test_no_two_rounds_and_no_two_workloads_share_a_prompt_and_all_sides_have_the_same(self):
        sets = [tuple(map(tuple, load.prompts(8, label))) for load in (DECODE, PREFILL) for label in ("warm-up", "0", "1")]
        flat = [prompt for prompts in sets for prompt in prompts]
        assert len(set(flat)) == len(flat) == 48
        assert DECODE.prompts(8, "0") == DECODE.prompts(8, "0")

    def test_what_is_the_engines_own_goes_with_every_request(self):
        (body,) = PREFILL.bodies("m", 1, "0", {"cache_prompt": False})
        assert (body["model"], body["max_tokens"], body["cache_prompt"], len(body["prompt"])) == ("m", 1, False, 512)


def test_every_id_of_the_vocabulary_is_a_token_and_nearly_all_are_text():
    vocab, merges = text_vocabulary()
    assert sorted(vocab.values()) == list(range(VOCAB_SIZE))
    assert all(first in vocab and second in vocab for first, second in merges)
    assert sum(text.isascii() for text in vocab) > 0.99 * VOCAB_SIZE


def test_what_vllm_asks_for_and_a_text_model_does_not_is_left_out():
    asked = [
        "regex",
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "torchvision; x",
        "pandas; extra == 'bench'",
        "fastapi[standard]<1",
    ]
    assert needed_requirements(asked) == ["regex", "fastapi[standard]<1"]


def test_sides_are_chosen_by_engine_or_by_name():
    assert [side.name for side in chosen("vllm,llama.cpp-f16")] == ["llama.cpp-f16", "vllm-float32", "vllm-bfloat16"]
    with pytest.raises(ValueError, match="no such side: ollama"):
        chosen("shoal,ollama")


def test_what_is_read_is_the_dense_part_and_the_experts_that_are_activated():
    shapes = {"model.embed_tokens.weight": [32, 8], "lm_head.weight": [32, 8], "model.layers.0.mlp.gate.weight": [4, 8]}
    shapes |= {f"model.layers.0.mlp.experts.{expert}.up_proj.weight": [16, 8] for expert in range(4)}
    assert floors.read_parameters(shapes, num_experts=4, activated=2.5) == 32 * 8 + 4 * 8 + 2.5 * 16 * 8
    assert MIXTRAL["num_local_experts"] == 8


def test_floors_are_what_reading_and_multiplying_allow():
    costs = floors.Costs(
        step_bytes={1: 1e9, 8: 2e9}, activated={1: 6.0, 8: 30.0}, parameters=500_000_000, active=60_000_000, head=10_000_000
    )
    lines = floors.table(floors.Machine(10e9, 120e9, 240e9), costs, (1, 8)).splitlines()
    assert lines[2] == "| reading, float32, tokens/s | 10 | 40 | 10240 |"
    assert lines[3] == "| reading, bfloat16, tokens/s | 20 | 80 | 20480 |"
    assert lines[4] == "| multiplying, float32, tokens/s | 1000 | 1000 | 1200 |"


def result(name, rate, p99_s, same=4):
    side = next(side for side in SIDES if side.name == name)
    each = Round(rate, rate, p99_s / 2, p99_s, 1.0)
    return Result(side, Agreement(same, 4), {1: each, 8: each, 32: each}, each)


def test_the_best_peer_of_a_column_is_one_whose_tokens_agree():
    results = [
        result("shoal-auto", 100.0, 0.2),
        result("vllm-float32", 50.0, 0.4),
        result("vllm-bfloat16", 500.0, 0.01, same=3),
        result("llama.cpp-f16", 40.0, 0.1),
    ]
    whole = results_table(results, (1, 8, 32))
    assert "| vllm | bfloat16 | 500 | 500 | 500 | 500 | 10.0 | 5.0 | 1,000 | 3 of 4: does not count |" in whole
    ratios = ratios_table(results, (1, 8, 32)).splitlines()
    assert ratios[2] == "| 1 client, tokens/s | 100 | 50.0 | vllm-float32 | 2.00 | 1.0 | yes |"
    assert ratios[6] == "| p99 gap at 32, ms | 200 | 100 | llama.cpp-f16 | 0.50 | 1.0 | no |"
    assert ratios_table(results[1:], (1, 8, 32)) == ""


def test_the_machine_is_measured_in_bytes_and_operations():
    assert floors._matrix_rate(torch.float32) > 1e9


def test_a_checkpoint_is_read_without_torch_as_torch_wrote_it(tmp_path):
    wanted = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(4), "c": torch.randn(2, 2).half()}
    save_file({name: wanted[name] for name in "ab"}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({"c": wanted["c"]}, tmp_path / "2.safetensors")
    arrays = Arrays(tmp_path)
    assert sorted(arrays) == ["a", "b", "c"]
    assert all(np.array_equal(arrays[name], wanted[name].float().numpy()) for name in "ab")
    with pytest.raises(ValueError, match="is F16"):
        arrays["c"]
