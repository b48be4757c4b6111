import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model.errors import ChatTemplateMissing, TokenizerError
from model.tokenizer import IncrementalDecoder, StopStrings, Tokenizer
from tests.model.tiny_tokenizer import write_byte_fallback, write_byte_level


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    return Tokenizer(write_byte_fallback(tmp_path_factory.mktemp("byte_fallback")))


def pieces_of(tokenizer, token_ids, prompt=()):
    decoder = IncrementalDecoder(tokenizer, prompt)
    return [*(decoder.push(token) for token in token_ids), decoder.flush()]


def test_text_goes_there_and_back(byte_level):
    text = "The naïve 你好 😀"
    assert byte_level.decode(byte_level.encode(text)) == text


def test_special_tokens_are_no_text(byte_level):
    begin, *rest = byte_level.encode("<s>hello</s>")
    assert begin in byte_level.special_token_ids
    assert byte_level.decode((begin, *rest)) == "hello"
    assert byte_level.decode((begin, *rest), skip_special_tokens=False) == "<s>hello</s>"


def test_chat_is_the_template_encoded_once(byte_level):
    ids = byte_level.chat([{"role": "user", "content": "hello"}])
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>user\nhello</s>\n<s>assistant\n"


def test_template_refusal_says_the_templates_words(byte_level):
    with pytest.raises(TokenizerError, match="system comes first"):
        byte_level.chat([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


def test_missing_template(byte_fallback):
    with pytest.raises(ChatTemplateMissing):
        byte_fallback.chat([{"role": "user", "content": "hello"}])


def test_missing_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_lone_surrogate_is_refused(byte_level):
    with pytest.raises(TokenizerError, match="character 2"):
        byte_level.encode("ab\ud800")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_token_bytes_join_to_the_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "the naïve 你好 😀"
    joined = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text, add_special_tokens=False))
    assert joined.decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(10**6) == b""


@given(st.data())
def test_pieces_join_to_the_decoding_of_all(byte_level, data):
    tokens = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=60))
    assert "".join(pieces_of(byte_level, tokens)) == byte_level.decode(tokens)


@given(st.data())
def test_pieces_join_whatever_broken_bytes_come(byte_level, data):
    one_byte = [t for t in range(byte_level.vocab_size) if len(byte_level.token_bytes(t)) == 1]
    tokens = data.draw(st.lists(st.sampled_from(one_byte), max_size=100))
    assert "".join(pieces_of(byte_level, tokens)) == byte_level.decode(tokens)


@given(st.text(max_size=40))
def test_pieces_of_real_text_are_whole_characters(byte_level, text):
    pieces = pieces_of(byte_level, byte_level.encode(text, add_special_tokens=False))
    assert "".join(pieces) == byte_level.decode(byte_level.encode(text, add_special_tokens=False))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
def test_pieces_join_with_byte_fallback(byte_fallback, data):
    tokens = data.draw(st.lists(st.integers(0, byte_fallback.vocab_size - 1), max_size=60))
    # A run of byte tokens with one bad byte becomes U+FFFD as a whole, which no stream can foresee.
    assume("\ufffd" not in byte_fallback.decode(tokens))
    assert "".join(pieces_of(byte_fallback, tokens)) == byte_fallback.decode(tokens)


@given(st.text(max_size=20), st.text(max_size=20))
def test_text_continues_the_prompt(byte_fallback, prompt, text):
    assume("\ufffd" not in prompt + text)
    prompt_ids = byte_fallback.encode(prompt, add_special_tokens=False)
    ids = [*prompt_ids, *(t for t in byte_fallback.encode(text, add_special_tokens=False))]
    pieces = pieces_of(byte_fallback, ids[len(prompt_ids) :], prompt_ids)
    assert byte_fallback.decode(prompt_ids) + "".join(pieces) == byte_fallback.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_space_before_a_continuation_stays(byte_fallback):
    prompt = byte_fallback.encode("the", add_special_tokens=False)
    continuation = byte_fallback.encode("hello", add_special_tokens=False)
    assert "".join(pieces_of(byte_fallback, continuation, prompt)) == " hello"
    assert "".join(pieces_of(byte_fallback, continuation)) == "hello"


def test_prompt_that_ends_inside_a_character(byte_level):
    first, *rest = [t for byte in "你".encode() for t in range(byte_level.vocab_size) if byte_level.token_bytes(t) == bytes([byte])]
    assert "".join(pieces_of(byte_level, [*rest, *byte_level.encode("hello")], [first])).endswith("hello")


def test_decoding_stays_cheap_on_garbage(byte_level):
    broken = next(t for t in range(byte_level.vocab_size) if byte_level.token_bytes(t) == b"\xff")
    decoder = IncrementalDecoder(byte_level)
    for _ in range(500):
        decoder.push(broken)
        assert len(decoder._window) <= 3 * decoder.MAX_PENDING


def cut_at_first_complete(text, stops):
    """Reads the text one character at a time until it ends with a stop string."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


ALPHABET = st.text(alphabet="ab!", max_size=30)


@given(ALPHABET, st.lists(st.text(alphabet="ab!", min_size=1, max_size=5), max_size=4), st.data())
def test_stops_cut_where_the_first_is_complete(text, stops, data):
    filter_ = StopStrings(stops)
    given_out = ""
    rest = text
    while rest:
        size = data.draw(st.integers(1, 4))
        given_out += filter_.push(rest[:size])
        rest = rest[size:]
        assert not any(stop in given_out for stop in stops)
    expected, stopped = cut_at_first_complete(text, stops)
    assert given_out + filter_.flush() == expected
    assert filter_.stopped is stopped


def test_only_what_may_begin_a_stop_is_held():
    filter_ = StopStrings(["END"])
    assert filter_.push("the E") == "the "
    assert filter_.held == "E"
    assert filter_.push("nd EN") == "End "
    assert filter_.push("D more") == ""
    assert filter_.stopped
    assert filter_.push("x") == ""


def test_stop_over_many_tokens(byte_level):
    text = "hello 你好 stop here"
    filter_ = StopStrings(["你好 stop"])
    pieces = pieces_of(byte_level, byte_level.encode(text))
    assert "".join(filter_.push(piece) for piece in pieces) + filter_.flush() == "hello "


def test_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
