"""Real weights end to end: SmolLM2 upcycled to experts, served with them on two hosts, says what the dense model says."""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from tests.cluster.conftest import App, Shoals
from tests.demo_checkpoint import demo_paths
from tests.shared_data import shared_data
from tests.tiny_models import assert_greedy_equal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NUM_TOKENS = 64
NUM_STREAMS = 32
ORACLE_BATCH = 20


def first_turns() -> list[str]:
    lines = shared_data("prompts/mt_bench.jsonl").read_text().splitlines()
    return [json.loads(line)["turns"][0] for line in lines]


def chat(app: App, question: str) -> list[int]:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.ChatRequest(model=app.name, messages=[pb.ChatMessage(role="user", content=question)], sampling=sampling)
    with grpc.insecure_channel(app.grpc) as channel:
        answers = rpc.InferenceStub(channel).Chat(request, timeout=600, metadata=app.metadata)
        return [token for answer in answers for token in answer.token_ids]


def dense_answers(questions: list[str]) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens for the dense model in float32, and the margin of its two best logits at each."""
    directory = demo_paths().dense
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False) for q in questions
    ]
    answers: list[tuple[list[int], list[float]]] = [([], [])] * len(questions)
    order = sorted(range(len(questions)), key=lambda place: len(prompts[place]))  # batches of like lengths: little padding
    for start in range(0, len(order), ORACLE_BATCH):
        places = order[start : start + ORACLE_BATCH]
        inputs = tokenizer([prompts[place] for place in places], return_tensors="pt", padding=True, add_special_tokens=False)
        lengths = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
        with torch.inference_mode():
            out = model.generate(
                **inputs, **lengths, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True, pad_token_id=0
            )
        best = torch.stack(out.logits).topk(2).values  # [steps, batch, 2]
        margins = (best[..., 0] - best[..., 1]).T
        for row, place in enumerate(places):
            answers[place] = (out.sequences[row, inputs.input_ids.shape[1] :].tolist(), margins[row].tolist())
    return answers


def test_upcycled_experts_answer_as_the_dense_model(shoals: Shoals, record_property):
    questions = first_turns()
    with shoals.running(demo_paths().mixtral, "demo") as app, ThreadPoolExecutor(NUM_STREAMS) as pool:
        ours = list(pool.map(lambda question: chat(app, question), questions))
    ties = []
    for place, (answer, (expected, margins)) in enumerate(zip(ours, dense_answers(questions), strict=True)):
        if tie := assert_greedy_equal(answer, expected, margins):
            ties.append(f"question {place}: {tie}")
    record_property("ties", ties)
    print(f"{len(questions)} answers of {NUM_TOKENS} tokens, {len(ties)} with a tie of the two best logits:", *ties, sep="\n")
    assert len(questions) == 80
