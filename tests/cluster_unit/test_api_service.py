import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.answer import Answer
from cluster.api.errors import ModelNotFound, RequestRefused, TextNotSupported
from cluster.api.service import Call, Limits
from cluster.api.stream_pace import PacedStream
from model.errors import ChatTemplateMissing
from model.tokenizer import StopStrings, Tokenizer
from router.errors import DeadlineExceeded, InvalidRequest, QueueFull
from router.request import Delta, Failure
from tests.cluster_unit.front_door import MODEL, each, logprobs_of, make_service, says
from tests.model.tiny_tokenizer import write_byte_fallback, write_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def call(**fields):
    fields.setdefault("prompts", ("hello",))
    return Call("id", **fields)


async def texts_of(service, wanted):
    plan = await service.plan(wanted)
    texts = [""] * len(plan.requests)
    finishes = [None] * len(plan.requests)
    async for delta in each(service.run(plan)):
        texts[delta.index] += delta.text
        finishes[delta.index] = delta.finish
    return texts, finishes


async def test_text_and_counts(tokenizer):
    ids = tokenizer.encode("hello 你好 😀")
    service, router = make_service(tokenizer, says([*ids, 1]))
    plan = await service.plan(call(sampling={"max_tokens": 40}))
    deltas = [delta async for delta in each(service.run(plan))]
    assert "".join(delta.text for delta in deltas) == "hello 你好 😀"
    assert not any("\ufffd" in delta.text for delta in deltas)
    last = deltas[-1]
    assert (last.finish, last.usage.prompt_tokens, last.usage.completion_tokens) == ("stop", 1, len(ids) + 1)
    assert 0 <= last.timing.first_token_s <= last.timing.total_s
    assert router.closed == [plan.requests[0].request_id]


async def test_answers_get_seeds_of_their_own(tokenizer):
    service, router = make_service(tokenizer, says([5, 6]))
    await texts_of(service, call(prompts=("a", "b"), n=3, sampling={"seed": 2**63 - 2}))
    assert [r.sampling.seed for r in router.requests] == [2**63 - 2, 2**63 - 1, -(2**63)] * 2
    assert len({r.request_id for r in router.requests}) == 6


async def test_a_seed_is_drawn_where_none_is_given(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    seeds = {(await service.plan(call())).requests[0].sampling.seed for _ in range(8)}
    assert len(seeds) == 8


async def test_default_lengths(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    assert (await service.plan(call())).requests[0].sampling.max_tokens == 16
    chat = (await service.plan(call(prompts=(), messages=({"role": "user", "content": "hello"},)))).requests[0]
    assert chat.sampling.max_tokens == 64 - len(chat.prompt_token_ids)


async def test_stop_string_ends_its_answer_and_only_it(tokenizer):
    ids = tokenizer.encode("hello world and so on")
    service, router = make_service(tokenizer, says(ids))
    wait = asyncio.Event()

    def script(request):
        if request.sampling.seed == 0:
            yield from says(ids)(request)
            yield wait  # never set: only the stop string ends it
        else:
            yield from says(tokenizer.encode("stop here"))(request)

    router.script = script
    texts, finishes = await texts_of(service, call(n=2, stop=("rld a",), sampling={"seed": 0, "max_tokens": 40}))
    assert texts == ["hello wo", "stop here"]
    assert finishes == ["stop", "stop"]
    assert len(router.closed) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompts": ("",)}, "prompt"),
        ({"prompts": ((),)}, "prompt"),
        ({"prompts": ()}, "prompt"),
        ({"prompts": ((5, 400),)}, "prompt"),
        ({"prompts": ((-1,),)}, "prompt"),
        ({"prompts": ("\ud800",)}, "prompt"),
        ({"prompts": ((5,) * 64,)}, "prompt"),
        ({"prompts": ((5,) * 60,), "sampling": {"max_tokens": 5}}, "max_tokens"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens"),
        ({"sampling": {"temperature": float("nan")}}, "temperature"),
        ({"sampling": {"temperature": -1.0}}, "temperature"),
        ({"sampling": {"top_p": 0.0}}, "top_p"),
        ({"sampling": {"top_k": -2}}, "top_k"),
        ({"sampling": {"repetition_penalty": float("inf")}}, "repetition_penalty"),
        ({"sampling": {"seed": 2**63}}, "seed"),
        ({"sampling": {"logprobs": 21}}, "logprobs"),
        ({"sampling": {"logit_bias": {5: float("nan")}}}, "logit_bias"),
        ({"sampling": {"logit_bias": {400: 1.0}}}, "logit_bias"),
        ({"sampling": {"stop_token_ids": (400,)}}, "stop_token_ids"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 65}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"prompts": (), "messages": ()}, "messages"),
        ({"prompts": (), "messages": ({"role": "user", "content": "x" * 99},)}, "messages"),
        ({"prompts": (), "messages": ({"role": "user", "content": "a"}, {"role": "system", "content": "b"})}, "messages"),
    ],
)
async def test_bad_calls_name_the_field(tokenizer, fields, field):
    service, router = make_service(tokenizer, says([5]))
    with pytest.raises(InvalidRequest, match=f"^{field}") as caught:
        await service.plan(call(**fields))
    assert caught.value.field == field
    assert router.requests == []


async def test_errors_use_the_protocols_names(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    with pytest.raises(InvalidRequest, match=r"^sampling\.top_p: ") as caught:
        await service.plan(call(sampling={"top_p": 2.0}, names={"top_p": "sampling.top_p"}))
    assert caught.value.field == "sampling.top_p"


async def test_unknown_model(tokenizer):
    service, _ = make_service(tokenizer, says([5]))
    with pytest.raises(ModelNotFound, match=MODEL):
        await service.plan(call(model="other"))
    await service.plan(call(model=MODEL))


async def test_checkpoints_without_template_or_tokenizer(tmp_path):
    service, _ = make_service(Tokenizer(write_byte_fallback(tmp_path)), says([5]))
    with pytest.raises(ChatTemplateMissing):
        await service.plan(call(prompts=(), messages=({"role": "user", "content": "x"},)))
    bare, _ = make_service(None, says([5, 6]))
    for fields in ({}, {"prompts": ((5,),), "stop": ("x",)}, {"prompts": (), "messages": ({"role": "user", "content": "x"},)}):
        with pytest.raises(TextNotSupported):
            await bare.plan(call(**fields))
    plan = await bare.plan(call(prompts=((5,),)))
    deltas = [delta async for delta in each(bare.run(plan))]
    assert [token.token_id for delta in deltas for token in delta.tokens] == [5, 6]
    assert "".join(delta.text for delta in deltas) == ""


async def test_deadline_ends_and_frees(tokenizer):
    service, router = make_service(tokenizer, lambda request: [Delta(request.request_id, (5,)), asyncio.Event()])
    plan = await service.plan(call(deadline_s=0.05))
    assert plan.requests[0].deadline_s == 0.05
    with pytest.raises(DeadlineExceeded):
        async for _ in each(service.run(plan)):
            pass
    assert router.closed == [plan.requests[0].request_id]


async def test_an_answer_that_is_complete_at_its_deadline_is_given(tokenizer):
    """The reader rests while the last delta and then the deadline come."""
    service, _ = make_service(tokenizer, says([5, 6]))
    plan = await service.plan(call(deadline_s=0.05))
    answer = each(service.run(plan))
    first = await anext(answer)
    await asyncio.sleep(0.1)
    rest = [delta async for delta in answer]
    assert [token.token_id for delta in (first, *rest) for token in delta.tokens] == [5, 6]
    assert rest[-1].finish is not None


async def test_a_paced_answer_rests_between_tokens_and_neither_before_the_first_nor_after_the_last(tokenizer, monkeypatch):
    rests = []

    async def rest(stream):
        rests.append(stream)
        await asyncio.sleep(0)

    monkeypatch.setattr(PacedStream, "rest", rest)
    service, _ = make_service(tokenizer, lambda request: [Delta(request.request_id), *says([5, 6, 7])(request)])
    for is_paced, num_rests in ((False, 0), (True, 2)):
        rests.clear()
        assert len([delta async for delta in each(service.run(await service.plan(call()), is_paced=is_paced))]) == 4
        assert len(rests) == num_rests


async def test_deadlines_have_a_default_and_a_limit(tokenizer):
    service, _ = make_service(tokenizer, says([5]), limits=Limits(default_deadline_s=7.0, max_deadline_s=9.0))
    assert (await service.plan(call())).requests[0].deadline_s == 7.0
    assert (await service.plan(call(deadline_s=100.0))).requests[0].deadline_s == 9.0


async def test_closing_the_stream_cancels_all_answers(tokenizer):
    service, router = make_service(tokenizer, lambda request: [Delta(request.request_id, (5,)), asyncio.Event()])
    stream = service.run(await service.plan(call(n=3)))
    await anext(stream)
    await stream.aclose()
    assert len(router.closed) == len(router.requests) == 3


async def test_router_errors_come_through(tokenizer):
    service, router = make_service(tokenizer, lambda _: [QueueFull("full")])
    with pytest.raises(QueueFull):
        await texts_of(service, call())
    router.script = lambda r: [Delta(r.request_id, finish="cancelled", failure=Failure("deadline_exceeded", "late"))]
    with pytest.raises(RequestRefused) as caught:
        await texts_of(service, call())
    assert caught.value.kind == "deadline_exceeded"


async def test_a_generation_without_an_end_is_an_error(tokenizer):
    service, _ = make_service(tokenizer, lambda request: [Delta(request.request_id, (5,))])
    with pytest.raises(RuntimeError, match="without a finish"):
        await texts_of(service, call())


async def test_one_failed_answer_ends_the_others(tokenizer):
    def script(request):
        if request.sampling.seed == 1:
            yield QueueFull("full")
        yield asyncio.Event()

    service, router = make_service(tokenizer, script)
    with pytest.raises(QueueFull):
        await texts_of(service, call(n=3, sampling={"seed": 0}))
    assert len(router.closed) == 3


@given(st.data())
def test_an_answers_text_is_cut_where_a_filter_over_all_of_it_cuts(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=40))
    whole = tokenizer.decode(tokens)
    substrings = st.integers(0, max(0, len(whole) - 1)).flatmap(lambda i: st.integers(1, 4).map(lambda size: whole[i : i + size]))
    stops = data.draw(st.lists(substrings.filter(bool), max_size=3)) if whole else []
    answer = Answer(tokenizer, (), stops, ())
    pieces, rest = [], tokens
    while rest and not (pieces and pieces[-1].finish):
        size = data.draw(st.integers(1, 3))
        step, rest = tuple(rest[:size]), rest[size:]
        pieces.append(answer.push(Delta("id", step, tuple(logprobs_of(t, 0)[0] for t in step), finish=None if rest else "length")))
    text = "".join(piece.text for piece in pieces)
    reference = StopStrings(stops)
    assert text == reference.push(whole) + reference.flush()
    assert pieces[-1].finish == ("stop" if reference.stopped else "length")
    given_out = [token for piece in pieces for token in piece.tokens]
    assert [token.token_id for token in given_out] == tokens[: len(given_out)]
    assert all(token.logprobs.chosen.token_id == token.token_id for token in given_out)
    if not reference.stopped:
        assert len(given_out) == len(tokens)
    # A token whose text is kept back is kept back too.
    sent = 0
    for piece in pieces:
        sent += len(piece.text)
        assert all(token.start <= sent for token in piece.tokens)


def test_a_stop_tokens_text_is_no_part_of_the_answer(tokenizer):
    comma = tokenizer.encode(",")[0]
    answer = Answer(tokenizer, (), (), {comma})
    assert answer.push(Delta("id", (*tokenizer.encode("hello"), comma), finish="stop")).text == "hello"
    assert Answer(tokenizer, (), (), {comma}).push(Delta("id", (comma,), finish="length")).text == ","
