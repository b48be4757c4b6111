import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from model.batch import Dispatch, ForwardPass
from router.engine import Engine, EngineConfig
from router.errors import BatchAtFault, ExpertsUnavailable, InvalidRequest, PoisonedBatch, QueueFull
from router.request import Delta, Failure, PositionLogprobs, Request, SamplingParams
from tests.reference.local_generation import LocalGenerator
from tests.reference.sampling import adjusted_row
from tests.tiny_models import EOS_TOKEN_IDS, VOCABULARY, assert_greedy_equal, oracle, oracle_greedy, oracle_logits, write_tiny

torch.set_num_threads(1)
NUM_TOKENS = 16
PROMPTS = [tuple(random.Random(n).choices(range(2, 400), k=n)) for n in (1, 5, 16, 17, 40, 90)]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @cache
    def loaded(name: str) -> LocalGenerator:
        return LocalGenerator.load(write_tiny(name, tmp_path_factory.mktemp(name)), num_pages=1)

    return loaded


@cache
def expected(name: str, prompt: tuple[int, ...]):
    return oracle_greedy(oracle(name), prompt, NUM_TOKENS)


@dataclass
class Answer:
    """All deltas of one request, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish: str | None = None
    failure: Failure | None = None

    def add(self, delta: Delta) -> None:
        assert self.finish is None, "a delta after the last one"
        if delta.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            assert not self.token_ids, "prompt logprobs come with the first token"
            self.prompt_logprobs = delta.prompt_logprobs
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish, self.failure = delta.finish, delta.failure


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_engine(local: LocalGenerator, clock=None, model=None, experts=None, **sizes) -> Engine:
    config = EngineConfig(**{"num_pages": 64, "max_model_len": 256, "max_batch_tokens": 128, **sizes})
    return Engine(model or local.model, experts or local.experts, config, torch.device("cpu"), *([clock] if clock else []))


def make_request(name: str, prompt: Iterable[int], generated: Iterable[int] = (), deadline_s: float | None = None, **sampling) -> Request:
    settings = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        generated_token_ids=tuple(generated),
        sampling=SamplingParams(**settings),
        deadline_s=deadline_s,
    )


def run(
    engine: Engine, requests: Iterable[Request] = (), answers: dict[str, Answer] | None = None, steps: int = 10_000
) -> dict[str, Answer]:
    answers = {} if answers is None else answers
    for request in requests:
        engine.add(request)
        answers[request.request_id] = Answer()
    for _ in range(steps):
        if not engine.has_work:
            assert engine.load.kv_use == 0.0
            break
        for delta in engine.step():
            answers[delta.request_id].add(delta)
    return answers


def run_one(engine: Engine, request: Request) -> Answer:
    return run(engine, [request])[request.request_id]


@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
@pytest.mark.parametrize("name", ["v2-groups", "v3-dynamic", "mixtral-window", "llama-llama3"])
def test_requests_that_join_and_leave_answer_as_if_alone(load, name, prefill_chunk):
    engine = make_engine(load(name), prefill_chunk=prefill_chunk)
    answers: dict[str, Answer] = {}
    for number, prompt in enumerate(PROMPTS):
        run(engine, [make_request(str(number), prompt, max_tokens=NUM_TOKENS - number)], answers, steps=3)
    run(engine, answers=answers)
    for number, prompt in enumerate(PROMPTS):
        alone = expected(name, prompt)
        num_tokens = NUM_TOKENS - number
        assert_greedy_equal(answers[str(number)].token_ids, alone.token_ids[:num_tokens], alone.margins[:num_tokens])
        assert answers[str(number)].finish == "length"
    assert engine.load.num_preemptions == 0
    assert engine.load.num_generated_tokens == sum(NUM_TOKENS - number for number in range(len(PROMPTS)))


@pytest.mark.parametrize("name", ["v3-dynamic", "mixtral-window", "llama"])
def test_preempted_requests_answer_as_if_alone(load, name):
    engine = make_engine(load(name), page_size=2, num_pages=53, prefill_chunk=16)
    prompts = [*PROMPTS[1:4], *PROMPTS]
    answers = run(engine, [make_request(str(n), prompt, logprobs=0, prompt_logprobs=1) for n, prompt in enumerate(prompts)])
    assert engine.load.num_preemptions >= 3
    for number, prompt in enumerate(prompts):
        alone = expected(name, prompt)
        assert_greedy_equal(answers[str(number)].token_ids, alone.token_ids, alone.margins)
        assert len(answers[str(number)].logprobs) == NUM_TOKENS
        assert len(answers[str(number)].prompt_logprobs) == len(prompt)


def test_random_load_with_cancellations(load):
    """Random arrivals, seeds, lengths and cancellations on few pages: whoever finishes has the tokens that it has alone."""
    chance = random.Random(1)
    local = load("v2-lite")
    engine = make_engine(local, page_size=4, num_pages=24, prefill_chunk=5, max_batch_tokens=24, max_running=6)
    requests, answers, cancelled = {}, {}, set()
    for number in range(40):
        prompt = chance.choices(range(2, 400), k=chance.randint(1, 40))
        request = make_request(
            str(number), prompt, temperature=chance.choice([0.0, 1.0]), seed=number, max_tokens=chance.randint(1, 30), top_p=0.9
        )
        requests[request.request_id] = request
        run(engine, [request], answers, steps=chance.randint(0, 4))
        live = [key for key, answer in answers.items() if answer.finish is None and key not in cancelled]
        if live and chance.random() < 0.2:
            cancelled.add(chance.choice(live))
            for key in cancelled:
                engine.cancel(key)
    run(engine, answers=answers)
    assert engine.load.num_preemptions > 0
    assert cancelled
    finished = [key for key, answer in answers.items() if answer.finish == "length"]
    assert {*finished, *cancelled} == answers.keys()
    for key in finished[::3]:
        assert answers[key].token_ids == run_one(make_engine(local), requests[key]).token_ids


@pytest.mark.parametrize("name", ["v2-lite", "llama"])
def test_seeds_do_not_care_who_else_is_in_the_batch(load, name):
    request = make_request("it", PROMPTS[3], temperature=1.0, seed=1234, top_p=0.95)
    alone = run_one(make_engine(load(name)), request)
    others = [make_request(f"o{n}", prompt, temperature=1.3, top_k=9, seed=n) for n, prompt in enumerate(PROMPTS)]
    crowded = run(make_engine(load(name), prefill_chunk=7), [*others[:3], request, *others[3:]])
    assert crowded["it"].token_ids == alone.token_ids
    other_seed = run_one(make_engine(load(name)), make_request("it", PROMPTS[3], temperature=1.0, seed=1235, top_p=0.95))
    assert other_seed.token_ids != alone.token_ids


def test_penalties_and_bias_as_in_transformers(load):
    params = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.7, "logit_bias": {5: 3.0, 9: -4.0}}
    answer = run_one(make_engine(load("llama")), make_request("a", PROMPTS[2], **params, min_tokens=4, ignore_eos=False))
    plain = expected("llama", PROMPTS[2]).token_ids
    assert answer.token_ids != plain, "the penalties changed nothing, so this shows nothing"
    settings = make_request("a", PROMPTS[2], **params, min_tokens=4).sampling
    generated: tuple[int, ...] = ()
    for token in answer.token_ids:
        logits = oracle_logits(oracle("llama"), PROMPTS[2] + generated)[-1]
        row = adjusted_row(logits, settings, PROMPTS[2], generated, tuple(EOS_TOKEN_IDS))
        assert row[token] >= row.max() - 1e-3
        generated += (token,)


@pytest.mark.parametrize("prefill_chunk", [7, 64])
@pytest.mark.parametrize("name", ["v3-yarn", "llama-dynamic"])
def test_logprobs_are_those_of_transformers(load, name, prefill_chunk):
    engine = make_engine(load(name), prefill_chunk=prefill_chunk)
    asked = make_request("a", PROMPTS[4], temperature=0.7, seed=3, logprobs=4, prompt_logprobs=2, repetition_penalty=1.2, max_tokens=4)
    answer = run(engine, [make_request("other", PROMPTS[1]), asked])["a"]
    truth = oracle_logits(oracle(name), PROMPTS[4]).log_softmax(dim=-1)
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(PROMPTS[4])
    for position, entry in enumerate(answer.prompt_logprobs[1:], start=1):
        check_entry(entry, PROMPTS[4][position], 2, truth[position - 1])
    if name == "llama-dynamic":
        check_entry(answer.logprobs[0], answer.token_ids[0], 4, truth[-1])
        return  # later tokens scale RoPE by their own length: one pass over all of them is not the truth for it
    whole = oracle_logits(oracle(name), (*PROMPTS[4], *answer.token_ids)).log_softmax(dim=-1)
    for step, entry in enumerate(answer.logprobs):
        check_entry(entry, answer.token_ids[step], 4, whole[len(PROMPTS[4]) + step - 1])


def check_entry(entry: PositionLogprobs, token: int, num_top: int, truth: torch.Tensor) -> None:
    assert entry.chosen.token_id == token
    assert entry.chosen.logprob == pytest.approx(float(truth[token]), abs=2e-3)
    assert abs(entry.chosen.rank - 1 - int((truth > truth[token]).sum())) <= 1
    best = truth.topk(num_top)
    assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=2e-3)
    assert len({top.token_id for top in entry.top}) == num_top


def test_a_one_token_prompt_has_no_logprob(load):
    answer = run_one(make_engine(load("llama")), make_request("a", (7,), prompt_logprobs=3, max_tokens=1))
    assert answer.prompt_logprobs == (None,)


def test_end_tokens_stop(load):
    engine = make_engine(load("llama"))
    always_end = {EOS_TOKEN_IDS[1]: 100.0}
    answers = run(
        engine,
        [
            make_request("stop", PROMPTS[1], logit_bias=always_end, ignore_eos=False),
            make_request("min", PROMPTS[1], logit_bias=always_end, ignore_eos=False, min_tokens=3),
            make_request("ignore", PROMPTS[1], logit_bias=always_end, min_tokens=3),
            make_request("own", PROMPTS[1], logit_bias={50: 100.0}, stop_token_ids=(50,), min_tokens=2),
            make_request("last", PROMPTS[1], logit_bias=always_end, ignore_eos=False, max_tokens=1),
        ],
    )
    assert (answers["stop"].token_ids, answers["stop"].finish) == ([EOS_TOKEN_IDS[1]], "stop")
    assert (len(answers["min"].token_ids), answers["min"].finish) == (4, "stop")
    assert not set(answers["min"].token_ids[:3]) & set(EOS_TOKEN_IDS)
    assert (answers["ignore"].token_ids, answers["ignore"].finish) == ([EOS_TOKEN_IDS[1]] * NUM_TOKENS, "length")
    assert (len(answers["own"].token_ids), answers["own"].token_ids[-1], answers["own"].finish) == (3, 50, "stop")
    assert answers["last"].finish == "stop"


@pytest.mark.parametrize("cut", [1, 5, NUM_TOKENS - 1])
@pytest.mark.parametrize("name", ["v3-dynamic", "llama"])
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(load, name, cut):
    sampling = {"temperature": 0.9, "seed": 77, "repetition_penalty": 1.1, "frequency_penalty": 0.4, "logprobs": 0}
    whole = run_one(make_engine(load(name)), make_request("a", PROMPTS[3], **sampling))
    resumed = run_one(make_engine(load(name)), make_request("a", PROMPTS[3], whole.token_ids[:cut], **sampling))
    assert resumed.token_ids == whole.token_ids[cut:]
    assert resumed.finish == "length"
    got, kept = ([entry.chosen.logprob for entry in answer.logprobs] for answer in (resumed, whole))
    assert got == pytest.approx(kept[cut:], abs=1e-3)


def test_min_tokens_counts_what_an_earlier_router_generated(load):
    request = make_request("a", PROMPTS[1], (20, 21), logit_bias={1: 100.0}, ignore_eos=False, min_tokens=3)
    assert len(run_one(make_engine(load("llama")), request).token_ids) == 2


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"prompt": ()}, "prompt_token_ids"),
        ({"prompt": (VOCABULARY,)}, "prompt_token_ids"),
        ({"prompt": (3, -1)}, "prompt_token_ids"),
        ({"prompt": (2**70,)}, "prompt_token_ids"),
        ({"prompt": (3,) * 64}, "prompt_token_ids"),
        ({"prompt": (3,) * 50}, "max_tokens"),
        ({"prompt": (3,) * 5, "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": (3,), "generated": (VOCABULARY,)}, "generated_token_ids"),
        ({"prompt": (3,), "generated": (4,) * NUM_TOKENS}, "generated_token_ids"),
        ({"prompt": (3,), "min_tokens": NUM_TOKENS + 1}, "min_tokens"),
        ({"prompt": (3,), "stop_token_ids": (VOCABULARY,)}, "stop_token_ids"),
        ({"prompt": (3,), "stop_token_ids": tuple(range(VOCABULARY)), "min_tokens": 1}, "min_tokens"),
        ({"prompt": (3,), "logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"prompt": (3,), "deadline_s": float("nan")}, "deadline_s"),
    ],
)
def test_bad_input_is_refused_by_field(load, request_fields, field):
    engine = make_engine(load("llama"), max_model_len=64)
    with pytest.raises(InvalidRequest) as refused:
        engine.add(make_request("a", **request_fields))
    assert refused.value.field == field
    assert not engine.has_work


def test_the_cache_may_be_smaller_than_the_model_is_long(load):
    engine = make_engine(load("llama"), num_pages=2, page_size=16)
    with pytest.raises(InvalidRequest) as refused:
        engine.add(make_request("a", (3,) * 20))
    assert refused.value.field == "max_tokens"
    assert run_one(engine, make_request("a", (3,) * 17)).finish == "length"


def test_ids_are_unique_while_they_run_and_free_afterwards(load):
    engine = make_engine(load("llama"))
    engine.add(make_request("a", (3,)))
    with pytest.raises(InvalidRequest) as refused:
        engine.add(make_request("a", (4,)))
    assert refused.value.field == "request_id"
    engine.cancel("a")
    assert run_one(engine, make_request("a", (4,))).finish == "length"


def test_a_full_queue_is_told_at_once(load):
    engine = make_engine(load("llama"), max_waiting=2, max_running=1)
    answers = run(engine, [make_request("a", (3,)), make_request("b", (3,))], steps=0)
    with pytest.raises(QueueFull):
        engine.add(make_request("c", (3,)))
    answers = run(engine, answers=answers, steps=1)
    run(engine, [make_request("c", (3,))], answers)
    assert {answer.finish for answer in answers.values()} == {"length"}


def test_a_passed_deadline_ends_the_request_wherever_it_is(load):
    clock = Clock()
    engine = make_engine(load("llama"), clock=clock, max_running=2)
    prompts = [make_request(name, PROMPTS[4], deadline_s=seconds) for name, seconds in (("runs", 5.0), ("stays", None), ("waits", 5.0))]
    answers = run(engine, prompts, steps=3)
    kv_use = engine.load.kv_use
    clock.now += 5.0
    run(engine, answers=answers, steps=1)
    for name in ("runs", "waits"):
        assert answers[name].finish == "cancelled"
        assert answers[name].failure.kind == "deadline_exceeded"
    assert len(answers["runs"].token_ids) == 3
    assert (engine.load.num_running, engine.load.num_waiting) == (1, 0)
    assert engine.load.kv_use == kv_use / 2
    run(engine, answers=answers)
    assert answers["stays"].finish == "length"


def test_cancelling_frees_the_pages_at_once(load):
    engine = make_engine(load("llama"), max_running=1)
    answers = run(engine, [make_request("runs", PROMPTS[5]), make_request("waits", PROMPTS[4])], steps=2)
    assert engine.load.kv_use > 0
    engine.cancel("runs")
    assert engine.load.kv_use == 0
    engine.cancel("waits")
    engine.cancel("waits")
    engine.cancel("nobody")
    assert not engine.has_work
    assert engine.step() == []
    assert len(answers["runs"].token_ids) == 2


class FailingExperts:
    """Experts that fail when told to, at either end."""

    def __init__(self, experts):
        self.experts = experts
        self.dispatch_error: Exception | None = None
        self.combine_error: Exception | None = None
        self.open = []

    def dispatch(self, layer, hidden, routing):
        if self.dispatch_error:
            raise self.dispatch_error
        handle = self.experts.dispatch(layer, hidden, routing)
        self.open.append(handle)
        return handle

    def combine(self, handle):
        self.abandon(handle)
        if self.combine_error:
            raise self.combine_error
        return self.experts.combine(handle)

    def abandon(self, handle):
        self.open = [other for other in self.open if other is not handle]


@pytest.mark.parametrize("where", ["dispatch_error", "combine_error"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ExpertsUnavailable("expert 3 of layer 1 is not ready on any host"), "experts_unavailable"),
        (ValueError("a secret detail"), "internal"),
    ],
)
def test_a_failed_step_takes_only_its_own_requests_with_it(load, caplog, where, error, kind):
    experts = FailingExperts(load("v2-lite").experts)
    engine = make_engine(load("v2-lite"), experts=experts, max_running=2)
    answers = run(engine, [make_request("a", PROMPTS[1]), make_request("b", PROMPTS[2]), make_request("waits", PROMPTS[3])], steps=2)
    setattr(experts, where, error)
    run(engine, answers=answers, steps=1)
    setattr(experts, where, None)
    for name in ("a", "b"):
        assert (answers[name].finish, answers[name].failure.kind, len(answers[name].token_ids)) == ("error", kind, 2)
        assert "secret" not in answers[name].failure.message
    assert ("a secret detail" in caplog.text) == (kind == "internal"), "the log has what the client must not see"
    assert engine.load.kv_use == 0
    run(engine, answers=answers)
    alone = expected("v2-lite", PROMPTS[3])
    assert_greedy_equal(answers["waits"].token_ids, alone.token_ids, alone.margins)


class WatchedModel:
    """A model of which one can tell whether the pass under way has a certain token in it."""

    POISON = 415

    def __init__(self, model):
        self.model = model
        self.config, self.cache_layout, self.gate = model.config, model.cache_layout, model.gate
        self.has_poison = False

    def forward(self, batch, cache) -> ForwardPass:
        self.has_poison = bool((batch.token_ids == self.POISON).any())
        return self.model.forward(batch, cache)


@pytest.mark.parametrize(("error", "kind"), [(BatchAtFault, "experts_unavailable"), (PoisonedBatch, "poisoned")])
def test_of_a_batch_that_is_at_fault_only_the_culprit_fails(load, error, kind):
    local = load("v2-lite")
    model = WatchedModel(local.model)
    num_failed = 0

    class FragileExperts(FailingExperts):
        def combine(self, handle):
            nonlocal num_failed
            if model.has_poison:
                num_failed += 1
                self.abandon(handle)
                raise error("layer 1 experts 2: it went wrong twice")
            return super().combine(handle)

    engine = make_engine(local, model=model, experts=FragileExperts(local.experts), prefill_chunk=16)
    answers = run(engine, [make_request(str(number), prompt) for number, prompt in enumerate(PROMPTS[:3])], steps=3)
    late = [make_request("bad", [*range(2, 32), WatchedModel.POISON, 5]), make_request("3", PROMPTS[3])]
    run(engine, late, answers)
    assert (answers["bad"].finish, answers["bad"].failure.kind, answers["bad"].token_ids) == ("error", kind, [])
    assert num_failed == 2, "once among others, once alone"
    for number, prompt in enumerate(PROMPTS[:4]):
        alone = expected("v2-lite", prompt)
        assert_greedy_equal(answers[str(number)].token_ids, alone.token_ids, alone.margins)


def test_a_request_that_is_at_fault_and_was_alone_is_not_tried_again(load):
    experts = FailingExperts(load("v2-lite").experts)
    experts.combine_error = PoisonedBatch("2 hosts were lost while they had this batch")
    engine = make_engine(load("v2-lite"), experts=experts)
    answers = run(engine, [make_request("a", PROMPTS[1])], steps=1)
    assert answers["a"].failure.kind == "poisoned"
    assert not engine.has_work


def test_a_pass_that_fails_between_dispatch_and_combine_leaves_nothing_open(load):
    local = load("v2-lite")
    experts = FailingExperts(local.experts)

    class FailingModel(PoisonedModel):
        def forward(self, batch, cache) -> ForwardPass:
            yield (yield self.next_dispatch(batch))

        def next_dispatch(self, batch):
            return Dispatch(1, self.model.embed(batch.token_ids), batch.token_ids)

    engine = make_engine(local, model=FailingModel(local.model), experts=experts)
    answers = run(engine, [make_request("a", PROMPTS[1])], steps=1)  # a handle is no message: the driver raises
    assert answers["a"].failure.kind == "internal"
    assert experts.open == []


class PoisonedModel:
    """A model that overflows on one token: NaN in its cache and in its logits."""

    POISON = 415

    def __init__(self, model):
        self.model = model
        self.config, self.cache_layout, self.gate, self.embed = model.config, model.cache_layout, model.gate, model.embed

    def forward(self, batch, cache) -> ForwardPass:
        logits = yield from self.model.forward(batch, cache)
        bad = batch.token_ids == self.POISON
        for entries in cache.layers:
            entries[0][batch.slots[bad]] = torch.nan
        logits[bad[batch.logit_rows]] = torch.nan
        return logits


def test_numbers_that_are_not_finite_fail_their_own_request_and_leave_nothing_behind(load):
    local = load("llama")
    engine = make_engine(local, model=PoisonedModel(local.model), num_pages=12)
    answers = run(engine, [make_request("good", PROMPTS[3]), make_request("bad", (5, 6, PoisonedModel.POISON))], steps=1)
    assert answers["bad"].failure.kind == "internal"
    assert "finite" in answers["bad"].failure.message
    run(engine, [make_request("next", PROMPTS[4]), make_request("third", PROMPTS[2])], answers)
    for name, prompt in (("good", PROMPTS[3]), ("next", PROMPTS[4]), ("third", PROMPTS[2])):
        alone = expected("llama", prompt)
        assert_greedy_equal(answers[name].token_ids, alone.token_ids, alone.margins)


def test_load_tells_how_full_it_is(load):
    engine = make_engine(load("llama"), page_size=4, num_pages=20, max_running=1)
    answers = run(engine, [make_request("a", (3,) * 9, max_tokens=3), make_request("b", (4,))], steps=1)
    load_now = engine.load
    assert (load_now.num_running, load_now.num_waiting, load_now.kv_use) == (1, 1, 3 / 20)
    assert (load_now.num_steps, load_now.num_prefill_tokens, load_now.num_generated_tokens) == (1, 9, 1)
    run(engine, answers=answers)
    assert engine.load.num_prefill_tokens == 10
    assert engine.load.num_generated_tokens == 3 + NUM_TOKENS
    assert all(isinstance(value, float) for value in engine.load.as_dict().values())


def test_the_queue_time_is_from_arrival_to_the_first_step(load):
    clock = Clock()
    engine = make_engine(load("mixtral"), clock, max_running=1)
    engine.add(make_request("first", PROMPTS[2], max_tokens=3))
    for name in ("second", "gone"):
        engine.add(make_request(name, PROMPTS[2], max_tokens=1))
    engine.cancel("gone")
    while engine.has_work:
        clock.now += 1.0
        engine.step()
    assert sum(engine.queue_time.counts) == 2, "whoever went away before its first step waited for nothing"
    assert engine.queue_time.total == 1.0 + 4.0
