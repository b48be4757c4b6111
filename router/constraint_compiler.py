"""Grammars from constraints: compiled once, kept while they are in use, given up where they would take too long."""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import llguidance

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from router.constraint import check_constraint, read_choices
from router.constraint_matcher import Matcher
from router.errors import InvalidRequest, NoTokenizer, QueueFull
from router.request import Constraint, Request

logger = logging.getLogger("shoal")

FIELD = "constraint"
# Between a JSON answer's tokens: a blank, or a new line and its indentation. Unbounded, a model could fill its answer with blanks.
WHITESPACE = r" |\r?\n[ \t]{0,24}"
JSON_OPTIONS: Any = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,  # an answer that two branches match would not validate
    "lenient": False,  # nor one to a schema whose keywords were skipped
}
PROBES = ("a", "true", '{"name": [1, null]}', "\n x é 你")
MAX_ERROR = 300  # characters of the library's own words


@dataclass(frozen=True)
class GrammarLimits:
    """What compiling and following a grammar may cost. The library's units of work: of lexing some 15,000 to 50,000 are a millisecond."""

    max_grammars: int = 256
    max_characters: int = 4 << 20  # of all constraints kept
    compile_timeout_s: float = 5.0
    max_late: int = 2  # compilations that were given up and still run
    max_symbols: int = 200_000
    compile_work: int = 2_000_000
    step_work: int = 200_000
    step_items: int = 50_000
    items_in_row: int = 10_000
    lexer_states: int = 50_000  # one or two KiB each


@dataclass(frozen=True)
class Grammar:
    """A compiled constraint: matchers are copies of `start`."""

    start: llguidance.LLMatcher
    num_characters: int


class GrammarCompiler:
    """A model's vocabulary as grammars need it, and the grammars compiled for it. Any thread may call it.

    The tokenizer is loaded when the first constraint comes: who sends none pays nothing. `load_tokenizer` raises TokenizerError
    where the checkpoint has none.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        end_token_ids: Collection[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = frozenset(end_token_ids)
        self._loading = threading.Lock()  # over the next two
        self._vocabulary: Vocabulary | None = None
        self._no_tokenizer = ""
        self._lock = threading.Lock()  # over the rest
        self._grammars: OrderedDict[Constraint, Grammar | InvalidRequest] = OrderedDict()
        self._num_characters = 0
        self._num_late = 0

    def matcher(self, request: Request) -> Matcher:
        """A matcher that has followed the tokens which the request's answer has already.

        InvalidRequest whose field is "constraint" (or "generated_token_ids"), NoTokenizer, or QueueFull while grammars that take too
        long keep the compiler busy. Takes up to compile_timeout_s: not for the thread of the engine.
        """
        constraint = request.sampling.constraint
        assert constraint is not None
        vocabulary = self._loaded()
        grammar = self._compiled(constraint, vocabulary)
        stops = frozenset(request.sampling.stop_token_ids)
        matcher = Matcher(
            grammar.start.deep_copy(),
            may_end_id=vocabulary.may_end_id,
            end_token_ids=stops if request.sampling.ignore_eos else stops | self._end_token_ids,
            special_ids=vocabulary.special_ids,
            num_words=vocabulary.num_words,
        )
        generated = request.generated_token_ids
        if generated and not matcher.grammar.consume_tokens(list(generated)):
            raise InvalidRequest("The tokens generated already do not satisfy the request's constraint.", field="generated_token_ids")
        return matcher

    def _loaded(self) -> "Vocabulary":
        with self._loading:
            if self._no_tokenizer:
                raise NoTokenizer(self._no_tokenizer, FIELD)
            if self._vocabulary is None:
                try:
                    tokenizer = self._load_tokenizer()
                except TokenizerError as error:
                    self._no_tokenizer = f"{FIELD}: {error} Its answers cannot be held to a form."
                    raise NoTokenizer(self._no_tokenizer, FIELD) from error
                self._vocabulary = Vocabulary(tokenizer, self._vocab_size, self._end_token_ids)
            return self._vocabulary

    def _compiled(self, constraint: Constraint, vocabulary: "Vocabulary") -> Grammar:
        with self._lock:
            known = self._grammars.get(constraint)
            if known is not None:
                self._grammars.move_to_end(constraint)
        if known is None:
            known = self._compile(constraint, vocabulary)
            self._keep(constraint, known)
        if isinstance(known, InvalidRequest):
            raise InvalidRequest(str(known), FIELD)
        return known

    def _keep(self, constraint: Constraint, grammar: Grammar | InvalidRequest) -> None:
        with self._lock:
            if constraint in self._grammars:
                return
            self._grammars[constraint] = grammar
            self._num_characters += len(constraint.value)
            while len(self._grammars) > self.limits.max_grammars or self._num_characters > self.limits.max_characters:
                oldest, _ = self._grammars.popitem(last=False)
                self._num_characters -= len(oldest.value)

    def _compile(self, constraint: Constraint, vocabulary: "Vocabulary") -> Grammar | InvalidRequest:
        """In a thread that can be left behind: the library has limits for all that is known to explode, and no way to be stopped."""
        try:
            check_constraint(constraint, vocabulary.tokenizer, FIELD)
            source = _source(constraint)
        except InvalidRequest as error:
            return error
        with self._lock:
            if self._num_late >= self.limits.max_late:
                raise QueueFull("Grammars that take too long keep this router's compiler busy: try again in a moment.")
        results: list[llguidance.LLMatcher] = []
        ended = threading.Event()
        is_late = False

        def compile_it() -> None:
            try:
                start = llguidance.LLMatcher(vocabulary.tokens, source, log_level=0, limits=_library_limits(self.limits))
                copy = start.deep_copy()
                copy.compute_bitmask()  # what cannot even begin is refused now, not in the middle of a step
                results.append(copy if copy.is_error() else start)
            finally:
                with self._lock:
                    ended.set()
                    self._num_late -= is_late

        threading.Thread(target=compile_it, name="grammar-compiler", daemon=True).start()
        ended.wait(self.limits.compile_timeout_s)
        with self._lock:
            is_late = not ended.is_set()
            self._num_late += is_late
        if not results and not is_late:
            return InvalidRequest(f"{FIELD}: cannot be compiled.", FIELD)
        if not results:
            logger.warning("a constraint of kind %s and %d characters took too long to compile", constraint.kind, len(constraint.value))
            return InvalidRequest(f"{FIELD}: takes more than {self.limits.compile_timeout_s:g} s to compile: make it simpler.", FIELD)
        if results[0].is_error():
            return InvalidRequest(f"{FIELD}: {_reason(results[0].get_error())}", FIELD)
        return Grammar(results[0], len(constraint.value))


class Vocabulary:
    """The tokens of a model as the grammar library wants them, and one of no model's behind them: `may_end_id`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_token_ids | frozenset(end_token_ids)
        num_tokens = max(vocab_size, tokenizer.vocab_size) + 1
        self.num_words = -(-num_tokens // 32)
        self.may_end_id = num_tokens - 1
        try:
            self.tokens = llguidance.LLTokenizer(tokenizer.as_json(), n_vocab=num_tokens, eos_token=self.may_end_id)
            sound = self._is_sound(num_tokens)
        except ValueError:
            sound = False
        if not sound:
            table: Any = TokenTable(tokenizer, num_tokens, self.special_ids)
            self.tokens = llguidance.LLTokenizer(table)

    def _is_sound(self, num_tokens: int) -> bool:
        """Whether the library reads the tokenizer's file as we do: every end a token without text, every text its own tokens.

        It does not for tokenizers that put a space before the first word: it would force that space upon answers.
        """
        ends = all(self.tokens.is_special_token(token_id) for token_id in self.special_ids if token_id < num_tokens)
        texts = all(self.tokens.decode_bytes(self.tokens.tokenize_str(text)) == text.encode() for text in PROBES)
        return ends and texts and all(self.tokens.decode_bytes([n]) == self.tokenizer.token_bytes(n) for n in self._probe_ids())

    def _probe_ids(self) -> Iterator[int]:
        """A thousand tokens across the vocabulary."""
        size = self.tokenizer.vocab_size
        return (n for n in range(0, size, max(1, size // 1000)) if n not in self.special_ids)


class TokenTable:
    """The table that the library takes for tokenizers whose files it does not read, in its words."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, special_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(num_tokens)]
        self.eos_token_id = num_tokens - 1
        self.tokens[self.eos_token_id] = b"<end>"
        self.special_token_ids = sorted({*(n for n in special_ids if n < num_tokens), self.eos_token_id})
        self._id_of = {piece: n for n, piece in enumerate(self.tokens) if piece and n not in set(self.special_token_ids)}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly the text's: as the tokenizer would, or the longest ones first."""
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if b"".join(self.tokens[n] for n in token_ids) == text.encode():
            return token_ids
        token_ids, rest = [], text.encode()
        while rest:
            length = next((n for n in range(min(self._longest, len(rest)), 0, -1) if rest[:n] in self._id_of), 0)
            if length == 0:
                break
            token_ids.append(self._id_of[rest[:length]])
            rest = rest[length:]
        return token_ids


def _library_limits(limits: GrammarLimits) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        max_items_in_row=limits.items_in_row,
        initial_lexer_fuel=limits.compile_work,
        step_lexer_fuel=limits.step_work,
        step_max_items=limits.step_items,
        max_lexer_states=limits.lexer_states,
        max_grammar_size=limits.max_symbols,
        verbose_errors=False,
    )


def _source(constraint: Constraint) -> str:
    """The constraint in the library's words."""
    if constraint.kind in ("json_schema", "json_object"):
        schema: Any = {"type": "object"} if constraint.kind == "json_object" else json.loads(constraint.value)
        if schema is False:
            raise InvalidRequest(f"{FIELD}: no answer satisfies the schema false.", FIELD)
        return str(llguidance.LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=JSON_OPTIONS))
    if constraint.kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(constraint.value))
    if constraint.kind == "choice":
        return str(llguidance.LLMatcher.grammar_from_regex("|".join(map(_literal, read_choices(constraint, FIELD)))))
    return json.dumps({"grammars": [{"lark_grammar": constraint.value}]})


def _literal(text: str) -> str:
    """The regular expression of exactly this text."""
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{{{ord(c):X}}}" for c in text)


def _reason(error: str) -> str:
    """The library's words, cut to a line that can be shown."""
    if "coerce_one_of" in error:
        return "oneOf is supported only where no two of its branches can both match: use anyOf."
    line = " ".join(error.split())
    return line if len(line) <= MAX_ERROR else line[:MAX_ERROR] + " ..."
