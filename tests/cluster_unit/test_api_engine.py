"""The front door over the real engine, in one process."""

import asyncio
import json

import pytest
import torch

from cluster.api.service import Call, TextService
from model.tokenizer import Tokenizer
from router.engine import Engine, EngineConfig
from router.errors import QueueFull
from tests.cluster_unit.engine_router import EngineRouter
from tests.cluster_unit.front_door import each, http_client
from tests.reference.local_generation import LocalGenerator
from tests.tiny_models import EOS_TOKEN_IDS, write_tiny

torch.set_num_threads(1)
NAME = "mixtral"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(NAME, tmp_path_factory.mktemp(NAME))


@pytest.fixture(scope="module")
def local(directory):
    return LocalGenerator.load(directory, num_pages=1)


@pytest.fixture
def service(local, directory):
    config = EngineConfig(num_pages=64, max_model_len=200, max_batch_tokens=64, max_waiting=8)
    router = EngineRouter(Engine(local.model, local.experts, config, torch.device("cpu")))
    vocab_size = local.model.config.vocab_size
    return TextService("tiny", router, Tokenizer(directory), vocab_size=vocab_size, max_model_len=200, end_token_ids=EOS_TOKEN_IDS)


async def complete(client, **fields):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "temperature": 0, "ignore_eos": True} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def test_concurrent_streams_say_what_each_says_alone(service):
    prompts = [f"{'hello and so on ' * n}{n}" for n in range(8)]
    async with http_client(service) as client:
        alone = [await complete(client, prompt=prompt) for prompt in prompts]
        together = await asyncio.gather(*(complete(client, prompt=prompt, stream=bool(n % 2)) for n, prompt in enumerate(prompts)))
    assert together == alone
    assert len(set(alone)) > 1


async def test_a_stop_string_cuts_the_same_text(service):
    async with http_client(service) as client:
        whole = await complete(client, max_tokens=40)
        stop = whole[len(whole) // 2 :][:3]
        assert await complete(client, max_tokens=40, stop=stop, stream=True) == whole[: whole.index(stop)]
    await service._generator._stepping
    assert service._generator.engine.load.kv_use == 0.0


async def test_the_same_seed_draws_the_same_text(service):
    async with http_client(service) as client:
        draws = [await complete(client, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


async def test_a_client_that_goes_away_frees_its_pages(service):
    engine = service._generator.engine
    sampling = {"max_tokens": 150, "ignore_eos": True}
    stream = service.run(await service.plan(Call("id", prompts=("hello",), n=2, sampling=sampling)))
    await anext(stream)
    assert engine.load.num_running + engine.load.num_waiting > 0
    await stream.aclose()
    await service._generator._stepping
    assert engine.load.kv_use == 0.0
    assert engine.load.num_steps < 150


async def test_a_full_queue_refuses_at_once(service):
    plan = await service.plan(Call("id", prompts=("hello",), n=12))
    with pytest.raises(QueueFull):
        async for _ in each(service.run(plan)):
            pass
    await service._generator._stepping
    assert service._generator.engine.load.kv_use == 0.0
