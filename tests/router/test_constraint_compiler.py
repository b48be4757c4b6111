import json
import threading

import pytest

from model.errors import TokenizerError
from model.sampling import SamplingState
from model.tokenizer import Tokenizer
from router import constraint_compiler
from router.constraint_compiler import GrammarCompiler, GrammarLimits, TokenTable, Vocabulary
from router.constraint_matcher import MaskComputer
from router.errors import InvalidRequest, NoTokenizer, QueueFull
from router.request import Constraint, SamplingParams
from tests.model.tiny_tokenizer import write_byte_fallback, write_byte_level
from tests.router.constrained import choice, json_schema, make_request, regex

VOCABULARY = 416


@pytest.fixture(scope="module", params=[write_byte_level, write_byte_fallback])
def tokenizer(request, tmp_path_factory):
    return Tokenizer(request.param(tmp_path_factory.mktemp(request.param.__name__)))


def compiler(tokenizer, **limits):
    return GrammarCompiler(lambda: tokenizer, VOCABULARY, (1, 411), GrammarLimits(**limits))


def matcher(grammars, constraint):
    return grammars.matcher(make_request("a", constraint))


def spoken(tokenizer, matcher):
    """The answer of one who always takes the first token that is allowed."""
    computer, state = MaskComputer(VOCABULARY), SamplingState(SamplingParams(), (5,), (), (1, 411))
    said = b""
    while not matcher.is_complete:
        with computer.computing([(0, matcher, state)]) as allowed:
            words = allowed.result().words[0]
        assert not matcher.is_stuck, matcher.error
        token = next(n for n in range(VOCABULARY) if words[n // 32] >> (n % 32) & 1)
        said += tokenizer.token_bytes(token)
        matcher.accept(token)
    return said.decode()


@pytest.mark.parametrize("text", ["yes", " yes", "é ü", "你好 😀", "a\n\t\\\"'/[(.*+?^$|{}])", "the capital"])
def test_both_kinds_of_tokenizer_say_exactly_the_text(tokenizer, text):
    assert spoken(tokenizer, matcher(compiler(tokenizer), choice(text))) == text


def test_the_table_says_what_the_tokenizers_file_says(tokenizer):
    table = TokenTable(tokenizer, VOCABULARY + 1, frozenset(tokenizer.special_token_ids))
    for text in ("hello world", "naïve 你", "x"):
        assert b"".join(table.tokens[n] for n in table(text)) == text.encode()


def test_a_vocabulary_wider_than_the_models_is_cut(tokenizer):
    vocabulary = Vocabulary(tokenizer, 100, ())
    assert vocabulary.may_end_id == tokenizer.vocab_size
    grammars = GrammarCompiler(lambda: tokenizer, 100, ())
    with MaskComputer(100).computing([(0, matcher(grammars, regex(".*")), SamplingState(SamplingParams(), (5,), (), ()))]) as allowed:
        words = allowed.result().words[0]
    assert words[:3].any()
    assert not words[4:].any()
    assert words[3] & ~0xF == 0


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (regex("(a"), "unclosed"),
        (regex("(?=a)b"), "look-around"),
        (json_schema({"type": "foo"}), "type"),
        (json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (json_schema({"$ref": "http://127.0.0.1:1/x"}), "fetch"),
        (json_schema({"not": {"type": "integer"}}), "not"),
        (json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
        (json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}), "use anyOf"),
        (json_schema({"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (json_schema(False), "no answer"),
        (json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "constraint: "),
        (json_schema({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"const": 1}}} for j in range(6)]} for i in range(8)]}), "large"),
        (Constraint(kind="grammar", value="start: nothing"), "nothing"),
        (Constraint(kind="grammar", value='{"grammars": []}'), "constraint: "),
        (Constraint(kind="grammar", value="start: X\nX: /.*a.{15}/ & /.*b.{17}/ & /.*c.{19}d/ & ~/.*d.{12}e.*/"), "constraint: "),
    ],
)
def test_what_cannot_be_compiled_is_refused_again_and_again(tokenizer, constraint, says):
    grammars = compiler(tokenizer)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=says) as caught:
            matcher(grammars, constraint)
        assert caught.value.field == "constraint"
        assert len(str(caught.value)) < 400


def test_a_grammar_is_compiled_once_and_the_least_used_goes(tokenizer, monkeypatch):
    compiled = []
    source = constraint_compiler._source
    monkeypatch.setattr(constraint_compiler, "_source", lambda constraint: compiled.append(constraint.value) or source(constraint))
    grammars = compiler(tokenizer, max_grammars=2)
    for letter in "aababcaacb":
        matcher(grammars, regex(letter))
    assert compiled == ["a", "b", "c", "a", "b"]
    small = compiler(tokenizer, max_characters=100)
    for letter in "aabbca":
        matcher(small, regex(letter * 40))
    assert [value[0] for value in compiled[5:]] == ["a", "b", "c", "a"]


def test_what_takes_too_long_is_given_up_and_does_not_pile_up(tokenizer, monkeypatch):
    grammars = compiler(tokenizer, compile_timeout_s=0.05, max_late=1)
    matcher(grammars, regex("known"))
    release = threading.Event()
    real = constraint_compiler.llguidance.LLMatcher

    def slow(*arguments, **options):
        assert release.wait(30)
        return real(*arguments, **options)

    slow.grammar_from_regex = real.grammar_from_regex
    monkeypatch.setattr(constraint_compiler.llguidance, "LLMatcher", slow)
    with pytest.raises(InvalidRequest, match=r"0\.05 s"):
        matcher(grammars, regex("slow"))
    with pytest.raises(QueueFull):
        matcher(grammars, regex("other"))
    matcher(grammars, regex("known"))
    late = [thread for thread in threading.enumerate() if thread.name == "grammar-compiler"]
    release.set()
    for thread in late:
        thread.join(30)
    monkeypatch.setattr(constraint_compiler.llguidance, "LLMatcher", real)
    matcher(grammars, regex("other"))
    with pytest.raises(InvalidRequest, match=r"0\.05 s"):  # remembered
        matcher(grammars, regex("slow"))


def test_the_tokenizer_is_loaded_for_the_first_constraint_and_once(tokenizer):
    loads = []
    grammars = GrammarCompiler(lambda: loads.append(1) or tokenizer, VOCABULARY, (1,))
    assert loads == []
    for _ in range(2):
        matcher(grammars, regex("a"))
    assert loads == [1]


def test_a_checkpoint_without_a_tokenizer_refuses():
    def load():
        raise TokenizerError("There is no tokenizer.")

    grammars = GrammarCompiler(load, VOCABULARY, (1,))
    for _ in range(2):
        with pytest.raises(NoTokenizer, match="no tokenizer") as caught:
            matcher(grammars, regex("a"))
        assert caught.value.field == "constraint"


def test_blanks_between_json_tokens_are_few(tokenizer):
    grammars = compiler(tokenizer)
    constraint = json_schema({"type": "array", "items": {"type": "integer"}})

    def passes(text):
        ids = [next(n for n in range(VOCABULARY) if tokenizer.token_bytes(n) == bytes([byte])) for byte in text.encode()]
        return matcher(grammars, constraint).grammar.try_consume_tokens(ids) == len(ids)

    assert all(passes(text) for text in ("[1, 2]", "[1,2]", "[\n  1,\n  2\n]", "[\r\n\t1]"))
    assert not any(passes(text) for text in ("[  1]", "[\n\n1]", "[\n" + " " * 25 + "1]", " [1]"))
    assert json.loads("[\r\n\t1]") == [1]
