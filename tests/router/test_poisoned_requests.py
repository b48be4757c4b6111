"""A request that kills every host that computes it fails alone, after few hosts; whoever was computed with it goes on."""

import random

import pytest
import torch

from model.logical_expert import LogicalExpert
from router.engine import Engine, EngineConfig
from router.transport.channel import Incoming
from tests.reference.local_generation import LocalGenerator
from tests.router.expert_cluster import LIMITS, Cluster, key
from tests.router.test_engine import WatchedModel, assert_greedy_equal, expected, make_request, run
from tests.tiny_models import write_tiny

torch.set_num_threads(1)

PROMPTS = [tuple(random.Random(n).choices(range(2, 400), k=n)) for n in (5, 9, 17)]


class Fleet(Cluster):
    """`num_hosts` at a time hold all experts; one that is given poison dies, and another takes its place in the next map."""

    def __init__(self, local: LocalGenerator, model: WatchedModel, num_hosts: int) -> None:
        super().__init__(1)
        layers = local.experts._slots._layers
        self.experts = {LogicalExpert(layer, expert): one for layer, held in layers.items() for expert, one in held.weights.items()}
        self.num_deaths = 0
        self._model = model
        for _ in range(num_hosts):
            self._replace()
        self.published = self.map()

    def _replace(self) -> None:
        entry = self.add_host(key(f"host-{len(self.hosts)}"), self.experts)
        serve = entry.memory.on_frame

        def on_frame(incoming: Incoming) -> None:
            if not self._model.has_poison:
                serve(incoming)
            elif not entry.is_down:
                self.num_deaths += 1
                entry.die()
                self._replace()
                self.published = self.map(n=self.published.version.n + 1)

        entry.memory.on_frame = on_frame


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_poisonous_request_costs_few_hosts_and_nobody_else_s_answer(tmp_path, num_hosts: int):
    local = LocalGenerator.load(write_tiny("v2-lite", tmp_path), num_pages=1)
    model = WatchedModel(local.model)
    with Fleet(local, model, num_hosts) as fleet:
        router = fleet.router(lambda: fleet.published, LIMITS)
        router.adopt(fleet.published)
        engine = Engine(model, router, EngineConfig(num_pages=64, max_model_len=256), torch.device("cpu"))
        answers = run(engine, [make_request(str(number), prompt) for number, prompt in enumerate(PROMPTS)], steps=3)
        run(engine, [make_request("bad", (7, 8, WatchedModel.POISON))], answers)
        assert answers["bad"].failure.kind == "poisoned"
        assert 1 < fleet.num_deaths <= 2 * LIMITS.max_deaths * num_hosts
        for number, prompt in enumerate(PROMPTS):
            alone = expected("v2-lite", prompt)
            assert_greedy_equal(answers[str(number)].token_ids, alone.token_ids, alone.margins)
        fleet.num_deaths = 0
        run(engine, [make_request("next", PROMPTS[0])], answers)
        assert answers["next"].token_ids == answers["0"].token_ids
        assert fleet.num_deaths == 0
