"""The clients that people have: the official openai package, and code generated from the .proto alone."""

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from cluster.api.proto.shoal.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from cluster.client import fetch_view, stream_text
from tests.cluster.conftest import App, Shoals
from tests.tiny_models import EOS_TOKEN_IDS, oracle, oracle_greedy, write_tiny

pytestmark = pytest.mark.cluster

NAME = "v2-lite"
PROTO = Path(__file__).resolve().parents[2] / "cluster" / "api" / "proto"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(NAME, tmp_path_factory.mktemp(NAME))


@pytest.fixture(scope="module")
def app(shoals: Shoals, checkpoint):
    with shoals.running(checkpoint, NAME, router__replicas=2, router__max_running=16, router__max_waiting=40) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def client(app: App):
    with openai.OpenAI(base_url=f"{app.http}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def expected_text(tokenizer, prompt: str, num_tokens: int) -> str:
    """What transformers says, up to the first end token."""
    token_ids = oracle_greedy(oracle(NAME), tokenizer(prompt).input_ids, num_tokens).token_ids
    ends = [place for place, token in enumerate(token_ids) if token in EOS_TOKEN_IDS]
    return tokenizer.decode(token_ids[: ends[0]] if ends else token_ids, skip_special_tokens=True)


def test_openai_completes(client, tokenizer):
    answer = client.completions.create(model=NAME, prompt="The capital of France is", max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected_text(tokenizer, "The capital of France is", 24)
    assert answer.usage.prompt_tokens == len(tokenizer("The capital of France is").input_ids)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_openai_chats(client, tokenizer):
    messages = [{"role": "user", "content": "Name three rivers."}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, temperature=0)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert answer.choices[0].message.content == expected_text(tokenizer, prompt, 24)


def test_openai_streams(client, tokenizer):
    chunks = list(
        client.completions.create(
            model=NAME, prompt="Once", max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected_text(tokenizer, "Once", 24)
    assert chunks[-1].usage.completion_tokens <= 24
    assert len(chunks) > 3


def test_openai_reads_our_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=NAME, prompt="x", max_tokens=-1)
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_client_generated_from_the_proto(app: App, tokenizer, tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([*command, "shoal/v1/inference.proto"], check=True, cwd=PROTO, timeout=60)
    program = f"""
import grpc
from shoal.v1 import inference_pb2 as pb, inference_pb2_grpc as rpc
with grpc.insecure_channel("{app.grpc}") as channel:
    request = pb.GenerateRequest(text="The capital of France is", sampling=pb.SamplingParams(temperature=0.0, max_tokens=24))
    for answer in rpc.InferenceStub(channel).Generate(request, timeout=60, metadata=(("application", "{app.name}"),)):
        print(answer.text, end="", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode() == expected_text(tokenizer, "The capital of France is", 24)


def test_64_streams_of_mixed_length_end_with_the_right_text(app: App, client, tokenizer):
    draw = random.Random(7)
    words = ["the", "river", "runs", "over", "stones", "and", "under", "bridges", "to", "a", "cold", "sea", "of", "glass"]
    prompts = [" ".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(16)] * 4
    lengths = [draw.randint(1, 48) for _ in range(16)] * 4

    def ask(place: int) -> str:
        chunks = client.completions.create(
            model=NAME, prompt=prompts[place], max_tokens=lengths[place], temperature=0, stream=True, extra_body={"ignore_eos": False}
        )
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    expected = [expected_text(tokenizer, prompts[place], lengths[place]) for place in range(16)]
    assert [answer for place, answer in enumerate(answers) if answer != expected[place % 16]] == []


def endless(app: App, stub: inference_pb2_grpc.InferenceStub, timeout_s: float) -> grpc.Call:
    """A stream that outlasts its test unless somebody ends it."""
    sampling = inference_pb2.SamplingParams(max_tokens=400, ignore_eos=True)
    request = inference_pb2.GenerateRequest(model=app.name, token_ids=inference_pb2.TokenIds(ids=[5] * 8), sampling=sampling)
    return stub.Generate(request, timeout=timeout_s, metadata=app.metadata)


def wait_until_idle(app: App) -> None:
    """Until no router has a request or a page in use, by their own reports."""
    until = time.monotonic() + 30
    while any(router[key] for router in app.view()["routers"] for key in ("num_running", "num_waiting", "kv_use")):
        assert time.monotonic() < until, app.view()["routers"]
        time.sleep(0.2)


def test_a_full_queue_refuses_at_once_and_a_cancelled_stream_frees_its_pages(app: App):
    with grpc.insecure_channel(app.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        calls = [endless(app, stub, 120) for _ in range(2 * (16 + 40) + 10)]
        with ThreadPoolExecutor(len(calls)) as pool:
            refused = [call for call in pool.map(first_or_refusal, calls) if call is not None]
        assert len(refused) >= 10
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert dict(refused[0].trailing_metadata())["shoal-error-kind"] == "queue_full"
        for call in calls:
            call.cancel()
    wait_until_idle(app)


def first_or_refusal(call: grpc.Call) -> grpc.Call | None:
    """The call if it was refused, None once it has answered or has waited for 5 s: it is in the queue then."""
    waiting = threading.Timer(5.0, call.cancel)
    waiting.start()
    try:
        next(call)
    except grpc.RpcError:
        return None if call.code() == grpc.StatusCode.CANCELLED else call
    finally:
        waiting.cancel()
    return None


def test_a_deadline_ends_the_stream_and_frees_its_pages(app: App):
    with grpc.insecure_channel(app.grpc) as channel:
        call = endless(app, inference_pb2_grpc.InferenceStub(channel), 0.5)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    body = {"model": app.name, "prompt": [5, 6], "max_tokens": 400, "ignore_eos": True}
    answer = httpx.post(f"{app.http}/v1/completions", json=body, headers={"X-Request-Timeout-S": "0.3"}, timeout=60)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    wait_until_idle(app)


def test_a_client_that_goes_away_frees_its_pages(app: App):
    body = {"model": app.name, "prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{app.http}/v1/completions", json=body, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until_idle(app)


def test_metrics_are_of_the_whole_application(app: App, client):
    client.completions.create(model=NAME, prompt="Once", max_tokens=8, temperature=0, extra_body={"ignore_eos": True})
    of_gateways = ("requests_total", "prompt_tokens_total", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count")
    of_routers = ("router_generated_tokens_total", "dispatch_frames_total", "request_queue_time_seconds_count", "expert_tokens_total")
    of_hosts = ("dispatch_queue_wait_seconds_count", "host_tokens_total", "host_busy_seconds_total")
    until = time.monotonic() + 30
    while not all((told := scraped(app))[f"shoal_{name}"] for name in (*of_gateways, *of_routers, *of_hosts)):
        assert time.monotonic() < until, told
        time.sleep(0.2)
    assert told["shoal_expert_replicas"] == told["shoal_placement_experts"] == 32
    assert told["shoal_members"] == 1 + 2 + 2
    assert told["shoal_placement_map_version"] == 1
    assert told["shoal_expert_tokens_total"] == told["shoal_layer_tokens_total"]


def scraped(app: App) -> dict[str, float]:
    """Each series' sum over its labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{app.http}/metrics", timeout=10).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return {"shoal_expert_tokens_total": 0.0, **sums}


def test_the_cluster_can_be_watched(app: App):
    with grpc.insecure_channel(app.grpc) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        placement = stub.GetPlacement(cluster_pb2.GetPlacementRequest(), timeout=10, metadata=app.metadata)
        assert len(placement.experts) == 32
        load = stub.GetLoad(cluster_pb2.GetLoadRequest(), timeout=10, metadata=app.metadata)
        assert len(load.hosts) == 2
        assert len(load.routers) == 2
    view = fetch_view(app.http)
    assert view["placement"]["version"][1] == 1
    assert "".join(stream_text(app.http, "Hello", max_tokens=4, temperature=0.0, chat=False))
