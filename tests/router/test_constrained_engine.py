"""Answers held to a form, by the whole engine on a tiny model: random weights have no wish of their own to write JSON."""

import json
import re

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from router.constraint_compiler import GrammarLimits
from router.errors import BatchAtFault, InvalidRequest, NoTokenizer
from router.request import Constraint
from tests.reference.local_generation import LocalGenerator
from tests.router.constrained import PERSON, choice, json_schema, make_engine, make_grammars, make_request, regex, run, tokens_of
from tests.tiny_models import write_tiny

torch.set_num_threads(1)
END = 1  # the tiny models' first end token
JSON_OBJECT = Constraint(kind="json_object")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def local(directory):
    return LocalGenerator.load(directory, num_pages=1)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def grammars(local, tokenizer):
    return make_grammars(local, tokenizer)


@pytest.fixture
def engine(local, grammars):
    return make_engine(local, grammars)


@pytest.fixture
def answer(engine, tokenizer):
    """The text of one constrained answer, which must have ended by itself."""

    def answer(constraint, **sampling):
        deltas = run(engine, make_request("a", constraint, **sampling))["a"]
        assert (deltas[-1].finish, deltas[-1].failure) == ("stop", None)
        return tokenizer.decode(tokens_of(deltas))

    return answer


def test_without_a_constraint_nothing_of_the_kind_comes_out(engine, tokenizer):
    text = tokenizer.decode(tokens_of(run(engine, make_request("a", None, max_tokens=20))["a"]))
    with pytest.raises(ValueError):
        json.loads(text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("expression", [r"[a-f]{3}-\d{4}", r"(yes|no|perhaps) [a-z]+\.", r"é+ü{2}你好", "x"])
def test_the_whole_answer_matches_the_expression(answer, expression, temperature):
    # An expression without an end of its own is ended by the end token, which a bias makes likely where it is allowed.
    text = answer(regex(expression), temperature=temperature, seed=3, logit_bias={END: 30.0})
    assert re.fullmatch(expression, text), text


def test_the_answer_is_one_of_the_choices_and_every_one_can_be(answer):
    choices = ["yes", "yes and no", "no\n", "$1.50 (or so)", "你好"]
    assert {answer(choice(*choices), temperature=50.0, seed=seed) for seed in range(80)} == set(choices)


def test_any_object(answer, tokenizer):
    """Biased towards closing what is open: an object has no end of its own."""
    closing = {token: bias for text, bias in (("}", 9.0), ('"', 6.0), ("]", 6.0)) for token in tokenizer.encode(text, False)}
    for seed in range(5):
        assert isinstance(json.loads(answer(JSON_OBJECT, temperature=1.0, seed=seed, logit_bias=closing)), dict)


def test_a_grammar_of_ones_own(answer):
    text = answer(Constraint(kind="grammar", value='start: "<" inner ">"\ninner: "(" inner ")" | /[a-z]{2}/'), temperature=1.0, seed=5)
    assert re.fullmatch(r"<(\(*)[a-z]{2}(\)*)>", text)
    assert text.count("(") == text.count(")")


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "seed": 7},
        {"temperature": 1.5, "seed": 8, "top_k": 3},
        {"temperature": 1.5, "seed": 9, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 1.0, "seed": 10, "repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"temperature": 1.0, "seed": 11, "logit_bias": {END: 100.0, 70: 50.0}},  # the end is wished for from the first token on
        {"temperature": 1.0, "seed": 12, "min_tokens": 60},
        {"temperature": 1.0, "seed": 13, "ignore_eos": True},
        {"temperature": 1.0, "seed": 14, "logprobs": 3, "prompt_logprobs": 2},
    ],
)
def test_it_holds_under_every_other_parameter(answer, sampling):
    jsonschema.validate(json.loads(answer(json_schema(PERSON), **sampling)), PERSON)


def test_200_answers_of_64_at_a_time_all_validate(engine, tokenizer):
    schemas = [
        PERSON,
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 5}, {"type": "string", "pattern": "^[A-Z]{2,4}$"}, {"type": "null"}]},
        {"type": "object", "properties": {"at": {"$ref": "#/$defs/point"}}, "required": ["at"], "additionalProperties": False}
        | {"$defs": {"point": {"type": "array", "prefixItems": [{"enum": [0, 1]}, {"enum": ["n", "s"]}], "items": False, "minItems": 2}}},
    ]
    requests = [
        make_request(str(n), json_schema(schemas[n % 4]), temperature=0.0 if n % 3 == 0 else 1.0, seed=n, prompt=(2 + n, 5, 9))
        for n in range(200)
    ]
    answers = run(engine, *requests)
    assert {deltas[-1].finish for deltas in answers.values()} == {"stop"}
    for n in range(200):
        jsonschema.validate(json.loads(tokenizer.decode(tokens_of(answers[str(n)]))), schemas[n % 4])
    assert len({tuple(tokens_of(deltas)) for deltas in answers.values()}) > 50


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-999, 999), st.integers(0, 999)),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size}, st.integers(0, 4), st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=4)), min_size=1, unique=True)),
    st.builds(lambda value: {"const": value}, st.one_of(st.booleans(), st.text(max_size=6))),
)


def nested(schemas):
    properties = st.dictionaries(st.text(alphabet='ab"\\ é{', min_size=1, max_size=4), schemas, max_size=3)
    return st.one_of(
        st.builds(
            lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
            schemas,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        properties.flatmap(
            lambda found: st.builds(
                lambda required: {"type": "object", "properties": found, "required": required, "additionalProperties": False},
                st.lists(st.sampled_from(sorted(found)), unique=True) if found else st.just([]),
            )
        ),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(schemas, min_size=1, max_size=3)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.recursive(LEAVES, nested, max_leaves=5), seed=st.integers(0, 1000))
def test_whatever_the_schema_the_answer_validates(answer, schema, seed):
    text = answer(json_schema(schema), temperature=1.0, seed=seed, max_tokens=900)
    jsonschema.validate(json.loads(text), schema)


def test_a_sequence_says_the_same_alone_and_among_others(engine):
    constrained = [make_request(f"c{n}", json_schema(PERSON), temperature=1.0, seed=n, prompt=(5 + n, 9)) for n in range(6)]
    free = [make_request(f"f{n}", None, temperature=1.0, seed=n, prompt=(5 + n, 9), max_tokens=40) for n in range(6)]
    alone = {request.request_id: tokens_of(run(engine, request)[request.request_id]) for request in constrained + free}
    together = run(engine, *constrained, *free)
    assert {name: tokens_of(deltas) for name, deltas in together.items()} == alone


def test_another_router_goes_on_where_the_first_one_died(engine, local, tokenizer):
    request = make_request("a", json_schema(PERSON), temperature=1.0, seed=4)
    whole = tokens_of(run(engine, request)["a"])
    other = make_engine(local, make_grammars(local, tokenizer))
    for sent in (1, len(whole) // 2, len(whole) - 1):
        resumed = run(other, request.model_copy(update={"generated_token_ids": tuple(whole[:sent])}))["a"]
        assert tokens_of(resumed) == whole[sent:]
        assert resumed[-1].finish == "stop"


def test_tokens_that_the_constraint_does_not_allow_are_not_gone_on_from(engine):
    with pytest.raises(InvalidRequest) as caught:
        engine.add(make_request("a", json_schema(PERSON), generated=(70, 71)))
    assert caught.value.field == "generated_token_ids"
    assert not engine.has_work


def test_who_had_to_give_way_goes_on_as_if_nothing_had_been(engine, local, grammars):
    requests = [make_request(str(n), json_schema(PERSON), temperature=1.0, seed=n, prompt=range(2 + n, 20 + n)) for n in range(6)]
    roomy = run(engine, *requests)
    tight = make_engine(local, grammars, num_pages=30, max_model_len=480)
    assert {name: tokens_of(deltas) for name, deltas in run(tight, *requests).items()} == {n: tokens_of(d) for n, d in roomy.items()}
    assert tight.load.num_preemptions > 0


def test_a_step_that_failed_has_not_moved_the_matchers(engine, local, grammars):
    class FailOnce:
        left = 3

        def dispatch(self, layer, hidden, routing):
            self.left -= 1
            if self.left == 0:
                raise BatchAtFault("the hosts say that it is the batch")
            return local.experts.dispatch(layer, hidden, routing)

        def combine(self, handle):
            return local.experts.combine(handle)

        def abandon(self, handle):
            local.experts.abandon(handle)

    requests = [make_request(str(n), json_schema(PERSON), temperature=1.0, seed=n) for n in range(3)]
    whole = run(engine, *requests)
    again = run(make_engine(local, grammars, experts=FailOnce()), *requests)
    assert {name: tokens_of(deltas) for name, deltas in again.items()} == {name: tokens_of(deltas) for name, deltas in whole.items()}


def test_logprobs_are_the_models_own_not_the_masks(engine):
    constraint = choice("yes", "no")
    [first, *_] = run(engine, make_request("a", constraint, logprobs=2, temperature=0.0))["a"]
    [free, *_] = run(engine, make_request("b", None, logprobs=2, temperature=0.0, max_tokens=1))["b"]
    assert first.logprobs[0].top == free.logprobs[0].top
    assert first.logprobs[0].chosen.rank > 2


def test_a_complete_grammar_ends_the_answer_without_an_end_token(engine, tokenizer):
    deltas = run(engine, make_request("a", regex("[ab]{3}"), min_tokens=50, ignore_eos=True))["a"]
    assert deltas[-1].finish == "stop"
    assert END not in tokens_of(deltas)
    assert re.fullmatch("[ab]{3}", tokenizer.decode(tokens_of(deltas)))


def test_the_end_waits_for_min_tokens_where_the_grammar_can_go_on(answer):
    assert len(answer(regex("a+"), logit_bias={END: 100.0}, min_tokens=5)) >= 5
    assert len(answer(regex("a+"), logit_bias={END: 100.0})) == 1


def test_an_answer_that_may_end_but_not_go_on_ends(engine):
    barred = dict.fromkeys(range(2, 400), -100.0)
    [delta] = run(engine, make_request("a", regex("()"), ignore_eos=True, logit_bias=barred))["a"]
    assert (delta.token_ids, delta.finish, delta.failure) == ((), "stop", None)


def test_an_own_stop_token_is_text_where_the_text_wants_it(engine, tokenizer):
    [stop] = tokenizer.encode("b", add_special_tokens=False)
    deltas = run(engine, make_request("a", regex("ab?c{9}|abb"), stop_token_ids=(stop,), logit_bias={stop: 100.0}))["a"]
    assert tokenizer.decode(tokens_of(deltas)) == "ab"
    assert deltas[-1].finish == "stop"


def test_an_answer_cut_by_max_tokens_says_so(engine):
    assert run(engine, make_request("a", json_schema(PERSON), max_tokens=5))["a"][-1].finish == "length"


def test_a_grammar_that_explodes_on_its_way_fails_alone(local, tokenizer):
    engine = make_engine(local, make_grammars(local, tokenizer, GrammarLimits(items_in_row=50)))
    wide = json_schema({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(99)}, "required": ["p98"]})
    answers = run(engine, make_request("bad", wide), make_request("good", json_schema({"enum": [True, None]})))
    [*_, bad] = answers["bad"]
    assert (bad.finish, bad.failure.kind, bad.failure.field) == ("error", "invalid_request", "constraint")
    assert tokens_of(answers["bad"])
    assert answers["good"][-1].finish == "stop"


def test_an_engine_without_a_tokenizer_refuses(local):
    with pytest.raises(NoTokenizer) as caught:
        make_engine(local, None).add(make_request("a", JSON_OBJECT))
    assert (caught.value.kind, caught.value.field) == ("no_tokenizer", "constraint")


def test_unconstrained_steps_start_nothing(local, grammars):
    engine = make_engine(local, grammars)
    run(engine, make_request("a", None, max_tokens=3))
    assert engine._masks is None
