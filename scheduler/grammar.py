"""Keeping an answer within a grammar: which tokens may come next in each sequence that has one.

A grammar is compiled once, on a worker thread, with the mask of the first token. Each of its sequences then has a
state; what a token does to it is found out by threads of this module, while the model already computes the next step.
So a grammar whose masks take long delays its own sequences and nobody else's.

llguidance does the work: an Earley parser over a lexer of regular-expression derivatives, and the vocabulary as a trie.
"""

import json
import re
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.scheduler.messages import GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance._lib import JsonCompileOptions

# Of one thread's own time: what a compilation and a mask may take, which no count of states or items bounds.
_MAX_COMPILE_S = 2.0
_MAX_MASK_S = 0.1
_NUM_THREADS = 2
_MAX_REASON_CHARS = 500
# A small model left alone writes spaces until its tokens are used up.
_JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]{0,40}",
    "coerce_one_of": False,
    "lenient": False,
}
# Where there is but one way on, llguidance tokenizes it, and Hugging Face's tokenizers see special tokens in any text.
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
# Control characters that a schema names: without `\u` they cannot be written.
_CONTROL = re.compile(r"(?i)\\u00[017]|\x7f|\\\\[xvc]")
_NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_SUBSCHEMAS = ("items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "allOf", "oneOf")
_NAMED_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")

# That a state has become ready.
_SETTLED = threading.Condition()

Mask = npt.NDArray[np.uint32]
Move = tuple["GrammarState", tuple[int, ...]]
IntArray = npt.NDArray[np.int64]


class GrammarError(Exception):
    """A grammar cannot be compiled, or has become too complex on the way."""


@dataclass(frozen=True, slots=True)
class Following:
    """What may follow: `mask` has token i's bit at i % 32 of word i // 32. `is_over` where nothing but an end may."""

    mask: Mask
    is_over: bool


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar: a matcher that no token is shown to, and what may come first. `num_bytes` is about what it
    holds in memory."""

    compiler: "GrammarCompiler"
    matcher: "LLMatcher"
    first: Following
    num_bytes: int

    def begin(self) -> "GrammarState":
        return GrammarState(self)


class GrammarState:
    """Where one sequence is in its grammar. It `is_ready` where it is known what may follow the last token, or never
    will be, for an `error`: the engine thread's then, and else a compiler's."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None  # not before the first token: most of a copy's time is not the caller's
        self._next = grammar.first
        self.compute_s = 0.0
        self.is_ready = True
        self.error: str | None = None

    @property
    def compiler(self) -> "GrammarCompiler":
        return self._grammar.compiler

    @property
    def is_over(self) -> bool:
        """Whether nothing but the answer's end may follow; of a state that is ready."""
        return self._next.is_over

    def must_end(self, stop_token_ids: IntArray) -> bool:
        """Whether nothing may follow but the answer's end, or one of these tokens; of a state that is ready."""
        if self.is_over:
            return True
        left = self._next.mask.copy()
        np.bitwise_and.at(left, stop_token_ids // 32, ~(np.uint32(1) << (stop_token_ids % 32).astype(np.uint32)))
        return not left.any()

    @property
    def mask(self) -> Mask:
        """The tokens that may follow, uint32 [ceil(V / 32)], bit by bit; of a state that is ready."""
        return self._next.mask

    def settle(self, found: "Following | GrammarError") -> None:
        """It is ready, with what was found to follow."""
        if isinstance(found, GrammarError):
            self.error = str(found)
        else:
            self._next = found
        self.is_ready = True
        with _SETTLED:
            _SETTLED.notify_all()

    def compute(self, token_ids: tuple[int, ...]) -> Following:
        """What may follow these tokens; for the threads of this module. Raises: GrammarError."""
        began_s = time.thread_time()
        if self._matcher is None:
            self._matcher = self._grammar.matcher.deep_copy()
        # The token that ends an answer is taken by a matcher in error too.
        if not self._matcher.consume_tokens([*token_ids]) or self._matcher.is_error():
            raise GrammarError(_reason(self._matcher) or "the answer left its grammar")
        following = self.compiler.following(self._matcher)
        self.compute_s = time.thread_time() - began_s
        if self.compute_s > _MAX_MASK_S:
            raise GrammarError("the grammar takes too long at this point of the answer")
        return following


def advance(moves: list[Move]) -> None:
    """Have it found out what may follow these tokens in these states, which are ready."""
    by_compiler: dict[GrammarCompiler, list[Move]] = {}
    for move in moves:
        state = move[0]
        assert state.is_ready, "the token before is not in the grammar yet"
        if state.error is None:
            state.is_ready = False
            by_compiler.setdefault(state.compiler, []).append(move)
    for compiler, own in by_compiler.items():
        compiler.submit(own)


def wait(states: Collection[GrammarState], most_s: float | None = None) -> None:
    """Block until all of these are ready, or so long."""
    with _SETTLED:
        _SETTLED.wait_for(lambda: all(state.is_ready for state in states), most_s)


def wait_for_any(states: Collection[GrammarState]) -> None:
    """Block until one of these is ready."""
    with _SETTLED:
        _SETTLED.wait_for(lambda: any(state.is_ready for state in states))


class GrammarCompiler:
    """Compiles grammars for one vocabulary: `tokenizer_json` as Hugging Face's `tokenizers` write it, `vocab_size` the
    model's, `eos_token_ids` those that end an answer. Raises: GrammarError where there are none."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        from llguidance import LLTokenizer  # which a start need not wait for

        if not eos_token_ids:
            raise GrammarError("the model has no token that ends an answer")
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
        self._ends = np.zeros(-(-vocab_size // 32), np.uint32)
        for token_id in eos_token_ids:
            self._ends[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="headrace-grammar")

    def compile(self, kind: GrammarKind, text: str) -> Grammar:
        """Compile a JSON schema, a regular expression, or a grammar in Lark's form or GBNF. Raises: GrammarError."""
        from llguidance import LLMatcher

        began_s = time.thread_time()
        matcher = LLMatcher(self._tokenizer, _grammar_of(kind, text), log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        first = self.following(matcher)
        took_s = time.thread_time() - began_s
        if took_s > _MAX_COMPILE_S:
            raise GrammarError("it takes too long to compile")
        if not first.mask.any():
            raise GrammarError("no text is in it")
        if kind is GrammarKind.JSON_SCHEMA:
            check_schema(text)
        return Grammar(self, matcher, first, _num_bytes(text, took_s))

    def submit(self, moves: list[Move]) -> None:
        """Have it found out what may follow the moves' tokens, one job for all of them: to hand each of a step's to a
        thread takes longer than what most of them need."""
        self._threads.submit(_settle, sorted(moves, key=lambda move: move[0].compute_s))

    def following(self, matcher: "LLMatcher") -> Following:
        """What may follow all that a matcher has been told. Raises: GrammarError where that is too complex."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._ends)]  # it has room for one token more
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return Following(mask, not (mask & ~self._ends).any())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


def _settle(moves: list[Move]) -> None:
    for state, token_ids in moves:
        found: Following | GrammarError
        try:
            found = state.compute(token_ids)
        except GrammarError as error:
            found = error
        except BaseException as error:  # a panic of llguidance's is no Exception
            found = GrammarError(f"the grammar cannot be followed here: {error}")
        state.settle(found)


def check_schema(text: str) -> None:
    """Check a JSON schema for what llguidance takes and does not hold to. Raises: GrammarError, naming the keyword."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return  # llguidance has its own words for it
    for each in _subschemas(schema):
        for keyword in _NUMBERS:
            if not _is_exact(each.get(keyword)):
                raise GrammarError(f'"{keyword}": an integer that no float64 is cannot be held to')
        least, required = each.get("minProperties"), each.get("required")
        if isinstance(least, int) and least > 1 + len(required if isinstance(required, list) else ()):
            # A name that is not in the schema may come twice.
            raise GrammarError('"minProperties" can be one more than there are "required" ones')


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema, where it is an object, and all within it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword in _SUBSCHEMAS:
        within = schema.get(keyword)
        for each in within if isinstance(within, list) else [within]:
            yield from _subschemas(each)
    for keyword in _NAMED_SUBSCHEMAS:
        if isinstance(named := schema.get(keyword), dict):
            for each in named.values():
                yield from _subschemas(each)


def _is_exact(value: Any) -> bool:
    """Whether all integers in it stay what they are as the floats that llguidance makes of them."""
    if isinstance(value, list):
        return all(map(_is_exact, value))
    if isinstance(value, dict):
        return all(map(_is_exact, value.values()))
    try:
        return not isinstance(value, int) or int(float(value)) == value
    except OverflowError:
        return False


def json_escapes(schema: str) -> str:
    """The letters that a backslash may come before in strings of an answer. With `\\u` a name could be written that the
    schema has another rule for, since llguidance compares names as they are written."""
    return 'nrbtf\\"u' if _CONTROL.search(schema) else 'nrbtf\\"'


def _grammar_of(kind: GrammarKind, text: str) -> str:
    """llguidance's own form of a grammar. Raises: GrammarError."""
    from llguidance import LLMatcher, grammar_from

    try:
        if kind is GrammarKind.LARK:
            return grammar_from("gbnf" if "::=" in text else "lark", text) + _UNFORCED
        if kind is GrammarKind.REGEX:
            made = json.loads(LLMatcher.grammar_from_regex(text))
            made["grammars"][0]["lark_grammar"] += _UNFORCED
            return json.dumps(made)
        # These go before what the schema says of itself, in "x-guidance".
        options: JsonCompileOptions = {**_JSON_OPTIONS, "json_allowed_escapes": json_escapes(text)}
        made = json.loads(LLMatcher.grammar_from_json_schema(text, overrides=options))
        made["grammars"].insert(0, {"lark_grammar": f"start: @{made['grammars'][0]['name']}{_UNFORCED}"})
        return json.dumps(made)
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    # In llguidance's own units. A mask of a common schema takes a hundredth of each.
    return LLParserLimits(
        step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=10_000, max_grammar_size=200_000
    )


def _reason(matcher: "LLMatcher") -> str:
    """Why a matcher is in error, on one line and without its state and what shows the place in a text."""
    reason = matcher.get_error().partition("<state>")[0].partition("\n   1 |")[0].strip()
    if reason.startswith("NoExtension"):
        return "no text is in it"
    return reason.replace("\n", " ")[:_MAX_REASON_CHARS]


def _num_bytes(text: str, took_s: float) -> int:
    """As measured: what one takes whatever its text, walked by a few answers, what 3,000 properties take, and what a
    schema of few characters takes whose alternatives multiply, by the time that it took to compile."""
    return 2**20 + 128 * len(text) + int(took_s * 2**25)
