import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import AllowedTokens, Choice, SamplingState, TokenHistory, sample, uniform
from router.request import SamplingParams
from tests.reference.sampling import adjusted_row, bracket, probabilities, splitmix64

torch.set_num_threads(1)
VOCAB = 97


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * scale


def state(
    params: SamplingParams, prompt: tuple[int, ...] = (1,), generated: tuple[int, ...] = (), end: tuple[int, ...] = ()
) -> SamplingState:
    return SamplingState(params, prompt, generated, end)


def token_of(choice: Choice) -> int:
    assert choice.token_id is not None
    return choice.token_id


params_strategy = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0.2, 3.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    top_k=st.one_of(st.sampled_from([-1, 0, 1, VOCAB, 1000]), st.integers(1, VOCAB)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    seed=st.integers(-(2**63), 2**63 - 1),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
    max_tokens=st.just(64),
    min_tokens=st.integers(0, 6),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
)
tokens_strategy = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)
row_strategy = st.tuples(
    params_strategy, tokens_strategy.map(lambda t: (*t, 3)), tokens_strategy, st.sets(st.integers(0, 9), max_size=3).map(tuple)
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_agrees_with_transformers_processors_row_by_row(rows, seed):
    logits = random_logits(len(rows), seed=seed)
    before = logits.clone()
    choices = sample(logits, [state(*row) for row in rows])
    assert torch.equal(logits, before)
    for raw, choice, (params, prompt, generated, end) in zip(logits, choices, rows, strict=True):
        token = token_of(choice)
        adjusted = adjusted_row(raw, params, prompt, generated, end)
        if params.temperature == 0.0:
            assert adjusted[token] >= adjusted.max() - 1e-5
        else:
            # float32 here, float64 there: u may lie on the other side of an edge by as little as that.
            low, high = bracket(probabilities(adjusted, params), token)
            assert low - 1e-4 <= splitmix64(params.seed, len(prompt) + len(generated)) <= high + 1e-4
        if params.logprobs is None:
            assert choice.ranked is None
            continue
        expected = raw.double().log_softmax(dim=-1)
        assert choice.ranked.chosen.token_id == token
        assert choice.ranked.chosen.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert choice.ranked.chosen.rank == 1 + int((raw > raw[token]).sum())
        assert [t.token_id for t in choice.ranked.top] == raw.sort(descending=True).indices[: params.logprobs].tolist()
        assert [t.logprob for t in choice.ranked.top] == pytest.approx(expected[[t.token_id for t in choice.ranked.top]].tolist(), abs=1e-5)
        assert [t.rank for t in choice.ranked.top] == list(range(1, params.logprobs + 1))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(row_strategy, st.none() | st.sets(st.integers(10, VOCAB - 1), min_size=1)), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    spare_words=st.integers(0, 2),
)
def test_constrained_rows_choose_as_if_the_other_tokens_were_impossible(rows, seed, spare_words):
    logits = random_logits(len(rows), seed=seed)
    before = logits.clone()
    states = [state(*row) for row, _ in rows]
    named = [number for number, (_, tokens) in enumerate(rows) if tokens is not None]
    words = np.zeros((len(named), -(-VOCAB // 32) + spare_words), dtype=np.int32)
    for place, number in enumerate(named):
        for token in rows[number][1]:
            words[place, token // 32] |= np.uint32(1 << (token % 32)).view(np.int32)
    choices = sample(logits, states, AllowedTokens(np.array(named, dtype=np.int64), words) if named else None)
    assert torch.equal(logits, before)
    free = sample(logits, states)
    for number, (((params, prompt, generated, end), tokens), choice) in enumerate(zip(rows, choices, strict=True)):
        if tokens is None:
            assert choice == free[number]
            continue
        token = token_of(choice)
        assert token in tokens
        adjusted = adjusted_row(logits[number], params, prompt, generated, end)
        barred = torch.tensor([n not in tokens for n in range(VOCAB)])
        adjusted = adjusted.masked_fill(barred, -torch.inf)
        if params.temperature == 0.0:
            assert adjusted[token] >= adjusted.max() - 1e-5
        else:
            low, high = bracket(probabilities(adjusted, params), token)
            assert low - 1e-4 <= splitmix64(params.seed, len(prompt) + len(generated)) <= high + 1e-4
        if choice.ranked is not None:
            expected = logits[number].double().log_softmax(dim=-1)
            assert choice.ranked.chosen.logprob == pytest.approx(float(expected[token]), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row_strategy, min_size=2, max_size=6), seed=st.integers(0, 10**6))
def test_a_row_does_not_depend_on_its_neighbours(rows, seed):
    logits = random_logits(len(rows), seed=seed)
    together = sample(logits, [state(*row) for row in rows])
    alone = [sample(logits[i : i + 1], [state(*row)])[0] for i, row in enumerate(rows)]
    assert [c.token_id for c in together] == [c.token_id for c in alone]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_uniform_is_splitmix64(seed, position):
    assert uniform(np.array([seed]), np.array([position]))[0] == splitmix64(seed, position)


def test_uniform_has_known_values():
    # Pinned, because a stream that moves to another router must go on with the same numbers.
    values = uniform(np.array([0, 0, 42, -1]), np.array([0, 1, 7, 7]))
    assert values.tolist() == [splitmix64(*pair) for pair in ((0, 0), (0, 1), (42, 7), (-1, 7))]
    # The first output of Vigna's splitmix64.c from state 0.
    assert values[0] == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_draws_follow_the_distribution():
    num_draws = 40_000
    logits = random_logits(1, vocab_size=12, scale=1.0)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=4)
    states = []
    for position in range(num_draws):
        states.append(state(params))
        states[-1].position = position
    counts = torch.zeros(12)
    for choice in sample(logits.expand(num_draws, -1), states):
        counts[token_of(choice)] += 1
    expected = (logits[0] / 0.8).softmax(dim=-1)
    deviations = (counts / num_draws - expected).abs() / (expected * (1 - expected) / num_draws).sqrt()
    assert deviations.max() < 4.5


@pytest.mark.parametrize("vocab_size", [5_000, 8_192])
def test_filters_wider_than_the_candidates(vocab_size):
    """Nearly flat: the first candidates do not reach the edge, so more are sorted; each row stops where it is sure."""
    logits = random_logits(5, vocab_size, scale=0.1)
    rows = [{"top_p": 0.7}, {"top_p": 0.01}, {"top_k": 300}, {"top_k": 300, "top_p": 0.3}, {"top_k": 4_500, "top_p": 0.99}]
    params = [SamplingParams(**row, seed=9) for row in rows]
    distributions = [probabilities(row, p) for row, p in zip(logits, params, strict=True)]
    for position in range(1, 60):
        states = [state(p) for p in params]
        for s in states:
            s.position = position
        for distribution, choice in zip(distributions, sample(logits, states), strict=True):
            low, high = bracket(distribution, token_of(choice))
            assert low - 1e-4 <= splitmix64(9, position) <= high + 1e-4
            assert high > low


def test_equal_probabilities_are_kept_together():
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, [4, 40, 80]] = 2.0
    tokens = set()
    for position in range(64):
        s = state(SamplingParams(top_k=1, top_p=0.2, seed=1))
        s.position = position
        tokens.add(token_of(sample(logits, [s])[0]))
    assert tokens == {4, 40, 80}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-45, seed=1),
        SamplingParams(temperature=1e-7, seed=1),
        SamplingParams(temperature=1e300, top_k=1, seed=1),
        SamplingParams(top_p=1e-300, seed=1),
        SamplingParams(min_p=1.0, seed=1),
    ],
)
def test_extremes_choose_the_likeliest(params):
    logits = random_logits(1)
    if params.temperature > 1e30:
        # So hot that all are equal: any token, but a token.
        assert 0 <= token_of(sample(logits, [state(params)])[0]) < VOCAB
    else:
        assert token_of(sample(logits, [state(params)])[0]) == int(logits.argmax())


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_extreme_repetition_penalty_stays_finite(penalty):
    choice = sample(random_logits(1), [state(SamplingParams(repetition_penalty=penalty, temperature=0.0), prompt=(1, 2, 3))])[0]
    assert choice.token_id is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_numbers_are_told_and_alone(temperature, bad):
    logits = random_logits(3)
    logits[1, 5] = bad
    states = [state(SamplingParams(temperature=temperature, seed=2, logprobs=2)) for _ in range(3)]
    clean = sample(random_logits(3), states)
    choices = sample(logits, states)
    assert choices[1].token_id is None
    assert (choices[0], choices[2]) == (clean[0], clean[2])


def test_end_tokens_are_barred_until_min_tokens():
    logits = random_logits(1)
    best = int(logits.argmax())
    s = state(SamplingParams(temperature=0.0, min_tokens=2, max_tokens=8), end=(best, 0))
    for _ in range(2):
        token = token_of(sample(logits, [s])[0])
        assert token not in (best, 0)
        s.append(token)
    assert token_of(sample(logits, [s])[0]) == best


@given(prompt=st.lists(st.integers(0, 500), max_size=300), generated=st.lists(st.integers(0, 500), max_size=300), split=st.integers(0, 300))
def test_history_counts(prompt, generated, split):
    history = TokenHistory(prompt, generated[:split])
    for token in generated[split:]:
        history.append(token)
    counted = dict(zip(history.ids.tolist(), history.generated_counts.tolist(), strict=True))
    assert counted == {token: generated.count(token) for token in {*prompt, *generated}}
