"""The grammars that requests bring, compiled once for all that bring the same, and kept under a byte limit.

Used by worker threads, several at once. The compiler, which takes as long to make as a large vocabulary is, is made for
the first of them.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

from headrace.scheduler.grammar import Grammar, GrammarCompiler, GrammarError
from headrace.scheduler.messages import GrammarKind
from headrace.server.errors import BadRequestError
from headrace.server.tokenizer import Tokenizer


class GrammarSource(NamedTuple):
    """A grammar as it was written, and the request's field that it came in."""

    kind: GrammarKind
    text: str
    field: str


class Grammars:
    """Compiled grammars of one model, the least recently used of which go where all take more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        self._compiled: OrderedDict[tuple[GrammarKind, str], Grammar] = OrderedDict()
        self.num_bytes = 0

    def get(self, source: GrammarSource, tokenizer: Tokenizer, vocab_size: int) -> Grammar:
        """Compile a grammar, or find it compiled. Raises: BadRequestError, which names its field."""
        key = source.kind, source.text
        with self._lock:
            if (grammar := self._compiled.get(key)) is not None:
                self._compiled.move_to_end(key)
                return grammar
        try:
            grammar = self._compiler_for(tokenizer, vocab_size).compile(*key)
        except GrammarError as error:
            raise BadRequestError(f"{source.field}: {error}", param=source.field) from None
        with self._lock:
            if key not in self._compiled:  # else another thread was quicker
                self._compiled[key] = grammar
                self.num_bytes += grammar.num_bytes
            while self.num_bytes > self._max_bytes:
                _, forgotten = self._compiled.popitem(last=False)
                self.num_bytes -= forgotten.num_bytes
        return grammar

    def _compiler_for(self, tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = tokenizer.grammar_compiler(vocab_size)
            return self._compiler

    def close(self) -> None:
        """End the compiler's threads; the engine has ended before."""
        if self._compiler is not None:
            self._compiler.close()
