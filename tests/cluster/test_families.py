"""Every family through real Ray actors, token for token what transformers says in float32."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.api.proto.shoal.v1 import inference_pb2 as pb
from cluster.api.proto.shoal.v1 import inference_pb2_grpc as rpc
from tests.cluster.conftest import FAR, App, Shoals
from tests.tiny_models import VOCABULARY, assert_greedy_equal, oracle, oracle_greedy, write_tiny

pytestmark = pytest.mark.cluster

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 17, 70, 130)


def prompts(max_model_len: int) -> list[list[int]]:
    """Ragged, past YaRN's original length and the sliding window, within the model's length."""
    lengths = [length for length in PROMPT_LENGTHS if length + NUM_TOKENS <= max_model_len]
    return [[(7 * length + 3 * place) % (VOCABULARY - 12) + 2 for place in range(length)] for length in lengths]


def generate(app: App, prompt: list[int]) -> list[int]:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(model=app.name, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    with grpc.insecure_channel(app.grpc) as channel:
        answers = rpc.InferenceStub(channel).Generate(request, timeout=120, metadata=app.metadata)
        return [token for answer in answers for token in answer.token_ids]


def assert_equals_transformers(app: App, name: str) -> None:
    with grpc.insecure_channel(app.grpc) as channel:
        models = rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=30, metadata=app.metadata).models
    asked = prompts(models[0].max_model_len)
    assert len(asked) == len(PROMPT_LENGTHS)
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        answers = list(pool.map(lambda prompt: generate(app, prompt), asked * 2))
    for prompt, once, again in zip(asked, answers[: len(asked)], answers[len(asked) :], strict=True):
        expected = oracle_greedy(oracle(name), prompt, NUM_TOKENS)
        for answer in (once, again):
            assert_greedy_equal(answer, expected.token_ids, expected.margins)


# The configs are spread over the layouts: every family meets every layout, nearly every config meets one.
@pytest.mark.parametrize(("name", "experts"), [("v2-linear", "hub"), ("v3-unnormalised", "fused"), ("mixtral-window-llama3", "fused")])
def test_one_router_two_hosts(shoals: Shoals, tmp_path, name, experts):
    with shoals.running(write_tiny(name, tmp_path, experts=experts), name) as app:
        assert_equals_transformers(app, name)


@pytest.mark.parametrize("name", ["v2-groups", "v3-yarn", "mixtral-window"])
def test_two_routers_three_hosts(shoals: Shoals, tmp_path, name):
    with shoals.running(write_tiny(name, tmp_path), name, router__replicas=2, expert_host__replicas=3) as app:
        assert_equals_transformers(app, name)
        view = app.view()
        assert len(view["hosts"]) == 3
        assert len(view["routers"]) == 2
        assert all(router["num_generated_tokens"] > 0 for router in view["routers"]), "both routers worked"


@pytest.mark.parametrize("name", ["v2-lite", "v3-two-groups", "mixtral-yarn"])
def test_hosts_on_another_node(shoals: Shoals, tmp_path, name):
    with shoals.running(write_tiny(name, tmp_path), name, expert_host__resources=FAR) as app:
        assert_equals_transformers(app, name)
        view = app.view()
        assert {host["node_id"] for host in view["hosts"]}.isdisjoint({router["node_id"] for router in view["routers"]})


@pytest.mark.parametrize(("name", "routers"), [("llama-dynamic", 1), ("llama-llama3", 2)])
def test_dense_without_any_host(shoals: Shoals, tmp_path, name, routers):
    with shoals.running(write_tiny(name, tmp_path), name, router__replicas=routers) as app:
        assert_equals_transformers(app, name)
        assert app.view()["hosts"] == []
