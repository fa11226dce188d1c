"""Keeping an answer within a grammar: which tokens may come next in each sequence that has one.

A grammar is compiled once, on a worker thread, with the mask of the first token. Each of its sequences then has a
state, owned by the engine thread; what a token does to it is found out by threads of this module, while the model
already computes the next step. So a grammar whose masks take long delays its own sequences and nobody else's.

llguidance does the work: an Earley parser over a lexer of regular-expression derivatives, and the vocabulary as a trie.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

Mask = npt.NDArray[np.uint32]


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
    """Where one sequence is in its grammar. One thread's, as all that it is told here is."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None  # not before the first token: most of a copy's time is not the caller's
        self._next = grammar.first
        self._pending: Future[Following] | None = None
        self.error: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether what may follow the last token is known, or will never be, for an `error`."""
        if self._pending is not None and self._pending.done():
            self._take(self._pending)
        return self._pending is None

    @property
    def is_over(self) -> bool:
        """Whether nothing but the answer's end may follow; of a state that is ready."""
        return self._next.is_over

    @property
    def mask(self) -> Mask:
        """The tokens that may follow, uint32 [ceil(V / 32)], bit by bit; of a state that is ready."""
        return self._next.mask

    def advance(self, *token_ids: int) -> None:
        """Have it found out what may follow these tokens; of a state that is ready."""
        assert self._pending is None, "the token before is not in the grammar yet"
        if self.error is None:
            self._pending = self._grammar.compiler.submit(self, token_ids)

    def wait(self, most_s: float | None = None) -> None:
        """Block until it is ready, or so long."""
        if self._pending is not None:
            wait([self._pending], most_s)

    def _take(self, pending: "Future[Following]") -> None:
        try:
            self._next = pending.result()
        except GrammarError as error:
            self.error = str(error)
        self._pending = None

    def compute(self, token_ids: tuple[int, ...]) -> Following:
        """What may follow these tokens; for the threads of this module. Raises: GrammarError."""
        began_s = time.thread_time()
        if self._matcher is None:
            self._matcher = self._grammar.matcher.deep_copy()
        # The token that ends an answer is taken by a matcher in error too.
        if not self._matcher.consume_tokens([*token_ids]) or self._matcher.is_error():
            raise GrammarError(_reason(self._matcher) or "the answer left its grammar")
        following = self._grammar.compiler.following(self._matcher)
        if time.thread_time() - began_s > _MAX_MASK_S:
            raise GrammarError("the grammar takes too long at this point of the answer")
        return following


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
        if time.thread_time() - began_s > _MAX_COMPILE_S:
            raise GrammarError("it takes too long to compile")
        if not first.mask.any():
            raise GrammarError("no text is in it")
        return Grammar(self, matcher, first, _num_bytes(text))

    def submit(self, state: GrammarState, token_ids: tuple[int, ...]) -> "Future[Following]":
        return self._threads.submit(state.compute, token_ids)

    def following(self, matcher: "LLMatcher") -> Following:
        """What may follow all that a matcher has been told. Raises: GrammarError where that is too complex."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._ends)]  # it has room for one token more
        if matcher.is_error():
            raise GrammarError(_reason(matcher))
        return Following(mask, not (mask & ~self._ends).any())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


def _grammar_of(kind: GrammarKind, text: str) -> str:
    """llguidance's own form of a grammar. Raises: GrammarError."""
    from llguidance import LLMatcher, grammar_from

    try:
        if kind is GrammarKind.JSON_SCHEMA:
            # These go before what the schema says of itself, in "x-guidance".
            return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        if kind is GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(text)
        return grammar_from("gbnf" if "::=" in text else "lark", text)
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


def _num_bytes(text: str) -> int:
    """As measured: what one takes whatever its text, walked by a few answers, and what 3,000 properties take."""
    return 2**20 + 128 * len(text)
