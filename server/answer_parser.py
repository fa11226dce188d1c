"""Reads a chat answer as it is written: what is reasoning, what is text, and what are tool calls.

Lives on the event loop; one per choice. A parser is a coroutine over its unread text: where that does not suffice to
decide, it yields until there is more, so that a format reads like its grammar and pieces may be cut anywhere. A call is
one from the moment that its name is known to be a tool's and its arguments begin; these are given out as they are
written, and looked at only for their end. What looked like a call and is none stays text.
"""

import json
import re
from collections.abc import Generator, Sequence
from typing import TypeVar

from pydantic_core import from_json

from headrace.server.answer_parts import (
    AnswerParser,
    Part,
    PlainText,
    ReasoningPart,
    TextPart,
    ToolArgumentsPart,
    ToolCallPart,
)
from headrace.server.detokenizer import overlap
from headrace.server.protocol import MAX_TOOL_NAME_CHARS, ChatCompletionRequest, GenerationParams
from headrace.server.tokenizer import ReasoningMarkers, Tokenizer
from headrace.server.tool_calls import CallStyle, find_format, find_reasoning, make_call_id

_T = TypeVar("_T")
# A part of a parser: with each `yield` it waits for more text.
_Reading = Generator[None, None, _T]

_SPACE = re.compile(r"\s*")
_NAME = re.compile("[a-zA-Z0-9_-]*")
# A call up to its arguments, as models write it that have learnt to. Spaces are bounded, so that looking for one is.
_CALL_HEAD = re.compile(
    r'\{\s{0,20}(?:"type"\s{0,20}:\s{0,20}"function"\s{0,20},\s{0,20})?'
    rf'"name"\s{{0,20}}:\s{{0,20}}"([a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME_CHARS}}})"\s{{0,20}},\s{{0,20}}'
    r'"(?:arguments|parameters)"\s{0,20}:\s{0,20}(?=\{)'
)
# The beginning of what is no object, or of one whose first field is none of a call's.
_NO_CALL = re.compile(r'(?!\{)|\{\s*(?:[^\s"]|"(?!(?:name|type|id|function|arguments|parameters)")[^"]*")')
# What has no bracket and no quote, in a string of JSON and outside.
_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_OUTSIDE = re.compile(r"[\s\w:,.+-]*")
# How many of a prompt's last tokens are looked at for a marker.
_NUM_LAST_TOKENS = 16


def make_parser(
    tokenizer: Tokenizer, request: ChatCompletionRequest, *, begins_in_reasoning: bool = False
) -> AnswerParser:
    """What reads one answer to the request; `begins_in_reasoning` is its generation's."""
    reasoning, style = _formats(tokenizer, request)
    if reasoning is None and style is None:
        return PlainText()
    return _Parser(
        reasoning,
        style,
        frozenset(tool.function.name for tool in request.callable_tools.values()),
        [marker for marker in _markers(reasoning, style) if tokenizer.special_token_id(marker) is not None],
        may_call_several=request.may_call_several,
        begins_in_reasoning=begins_in_reasoning,
    )


def is_only_text(tokenizer: Tokenizer, request: ChatCompletionRequest) -> bool:
    """Whether an answer to the request has no other parts."""
    return _formats(tokenizer, request) == (None, None)


def kept_token_ids(tokenizer: Tokenizer, request: GenerationParams) -> tuple[int, ...]:
    """The special tokens that the request's parser, if it has one, must see."""
    if not isinstance(request, ChatCompletionRequest) or not request.has_parts:
        return ()
    token_ids = map(tokenizer.special_token_id, _markers(*_formats(tokenizer, request)))
    return tuple(token_id for token_id in token_ids if token_id is not None)


def begins_in_reasoning(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
    """Whether a prompt ends where the model's reasoning has just begun."""
    reasoning = find_reasoning(tokenizer.chat_template())
    if reasoning is None:
        return False
    end = tokenizer.decode(list(prompt_token_ids[-_NUM_LAST_TOKENS:]), skip_special_tokens=False)
    return end.rstrip().endswith(reasoning.opening)


def _formats(tokenizer: Tokenizer, request: ChatCompletionRequest) -> tuple[ReasoningMarkers | None, CallStyle | None]:
    """What there may be in an answer beside text, None for what there is not.

    One that keeps to a grammar of the client's is what that says and nothing else.
    """
    if request.grammar_source is not None and not request.has_call_grammar:
        return None, None
    has_tools = bool(request.callable_tools)
    template = tokenizer.chat_template(has_tools=has_tools)
    return find_reasoning(template), find_format(template).style if has_tools else None


def _markers(reasoning: ReasoningMarkers | None, style: CallStyle | None) -> Sequence[str]:
    return (*(reasoning or ()), *(style.markers if style else ()))


class _ObjectScanner:
    """Finds the end of a JSON object that comes in pieces; it is inside of `depth` brackets already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = False
        self.is_over = False

    def scan(self, text: str) -> int:
        """How many characters belong to the object. It goes on behind them: what is left is to be shown once more.

        Afterwards `is_over` tells whether it has ended there, or is no JSON from there on.
        """
        at = 0
        while not self.is_over:
            run = (_IN_STRING if self._is_in_string else _OUTSIDE).match(text, at)
            assert run is not None, "it may be empty"
            at = run.end()
            char = text[at : at + 1]
            if not char or (char == "\\" and self._is_in_string):  # an escape is looked at when it is whole
                return at
            if char == '"':
                self._is_in_string = not self._is_in_string
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                self.is_over = self._depth == 0
            else:
                self.is_over = True
                return at
            at += 1
        return at


class _OneCallOnly(Exception):
    """A second call begins where there may be one."""


class _Parser:
    """Of answers with reasoning, where there are markers of it, and with calls of the named tools, where they have a
    style. `hidden` are the markers that are special tokens, which are never a client's text."""

    def __init__(
        self,
        reasoning: ReasoningMarkers | None,
        style: CallStyle | None,
        names: frozenset[str],
        hidden: Sequence[str],
        *,
        may_call_several: bool,
        begins_in_reasoning: bool,
    ) -> None:
        self._style = style
        self._names = names
        self._hidden = hidden
        self._may_call_several = may_call_several
        self._num_calls = 0
        self._unread = ""
        self._taken = ""  # since the last part: text after all, where no call comes of it
        self._is_over = False
        self._parts: list[Part] = []
        self._reading = self._read(reasoning, begins_in_reasoning)

    def push(self, text: str) -> list[Part]:
        self._unread += text
        return self._go_on()

    def finish(self) -> list[Part]:
        self._is_over = True
        return self._go_on()

    def _go_on(self) -> list[Part]:
        next(self._reading, None)
        parts, self._parts = self._parts, []
        return parts

    def _read(self, reasoning: ReasoningMarkers | None, begins_in_reasoning: bool) -> _Reading[None]:
        if reasoning is not None:
            yield from self._read_reasoning(reasoning, begins_in_reasoning)
        try:
            match self._style:
                case None:
                    yield from self._read_until(None, TextPart)
                case CallStyle.HERMES:
                    yield from self._read_hermes()
                case CallStyle.LLAMA:
                    yield from self._read_llama()
                case CallStyle.MISTRAL_LIST | CallStyle.MISTRAL_NAMED:
                    yield from self._read_mistral()
        except _OneCallOnly:
            return

    def _read_reasoning(self, markers: ReasoningMarkers, has_begun: bool) -> _Reading[None]:
        space = yield from self._take_all(_SPACE)
        if not (yield from self._take(markers.opening)) and not has_begun:
            self._unread = space + self._unread
            return
        yield from self._take_all(_SPACE)
        if (yield from self._read_until(markers.closing, ReasoningPart)):
            yield from self._take_all(_SPACE)

    def _read_hermes(self) -> _Reading[None]:
        opening, closing = CallStyle.HERMES.markers
        while (yield from self._read_until(opening, TextPart)):
            yield from self._take_all(_SPACE)
            if (yield from self._read_call()):
                yield from self._take_all(_SPACE)
                yield from self._take(closing)
                yield from self._take_all(_SPACE)
            else:
                self._give_back()

    def _read_llama(self) -> _Reading[None]:
        [opening] = CallStyle.LLAMA.markers
        self._taken = ""
        yield from self._take_all(_SPACE)
        yield from self._take(opening)  # which may be missing at the very start
        while True:
            yield from self._take_all(_SPACE)
            while (yield from self._read_call()):
                yield from self._take_all(_SPACE)
                if not (yield from self._take(";")):
                    break
                yield from self._take_all(_SPACE)
                yield from self._take(opening)
                yield from self._take_all(_SPACE)
            else:
                self._give_back()
            if not (yield from self._read_until(opening, TextPart)):
                return

    def _read_mistral(self) -> _Reading[None]:
        opening, call_id, arguments = CallStyle.MISTRAL_NAMED.markers
        while (yield from self._read_until(opening, TextPart)):
            yield from self._take_all(_SPACE)
            if (yield from self._take("[")):
                yield from self._take_all(_SPACE)
                while (yield from self._read_call()):
                    yield from self._take_all(_SPACE)
                    if not (yield from self._take(",")):
                        yield from self._take("]")
                        yield from self._take_all(_SPACE)
                        break
                    yield from self._take_all(_SPACE)
                else:
                    self._give_back()
                continue
            name = yield from self._take_all(_NAME)
            if (yield from self._take(call_id)):
                yield from self._take_all(_NAME)
            yield from self._take(arguments)
            yield from self._take_all(_SPACE)
            if name in self._names and (yield from self._sees("{")):
                self._begin_call(name)
                yield from self._read_arguments()
                yield from self._take_all(_SPACE)
            else:
                self._give_back()

    def _read_call(self) -> _Reading[bool]:
        """Read an object that is a call; False, with nothing read, where there is none."""
        scanner, num_scanned = _ObjectScanner(), 0
        while True:
            if (head := _CALL_HEAD.match(self._unread)) is not None:
                if head[1] not in self._names:
                    return False
                self._begin_call(head[1])
                self._unread = self._unread[head.end() :]
                yield from self._read_arguments()
                yield from self._take_all(_SPACE)
                if (yield from self._take(",")):
                    yield from self._skip_fields()
                else:
                    yield from self._take("}")
                self._taken = ""
                return True
            if self._unread and _NO_CALL.match(self._unread):
                return False
            num_scanned += scanner.scan(self._unread[num_scanned:])
            if scanner.is_over:  # its fields have another order
                name, arguments = _call_of(self._unread[:num_scanned])
                if name not in self._names:
                    return False
                self._begin_call(name)
                self._parts.append(ToolArgumentsPart(self._num_calls - 1, arguments))
                self._unread = self._unread[num_scanned:]
                return True
            if self._is_over:
                return False
            yield

    def _begin_call(self, name: str) -> None:
        """Raises: _OneCallOnly."""
        if self._num_calls and not self._may_call_several:
            raise _OneCallOnly
        assert self._style is not None
        self._parts.append(ToolCallPart(self._num_calls, make_call_id(self._style), name))
        self._num_calls += 1
        self._taken = ""

    def _read_arguments(self) -> _Reading[None]:
        scanner = _ObjectScanner()
        while True:
            end = scanner.scan(self._unread)
            if self._is_over and not scanner.is_over:
                end = len(self._unread)
            if end:
                self._parts.append(ToolArgumentsPart(self._num_calls - 1, self._unread[:end]))
                self._unread = self._unread[end:]
            if scanner.is_over or self._is_over:
                return
            yield

    def _skip_fields(self) -> _Reading[None]:
        """Read what is left of a call's object."""
        scanner = _ObjectScanner(depth=1)
        while True:
            self._unread = self._unread[scanner.scan(self._unread) :]
            if scanner.is_over or self._is_over:
                return
            yield

    def _read_until(self, marker: str | None, make: type[TextPart] | type[ReasoningPart]) -> _Reading[bool]:
        """Give out parts up to the marker and take it, with the space before it; False where the answer ends before."""
        self._taken = ""
        markers = {*self._hidden} if marker is None else {*self._hidden, marker}
        while True:
            places = ((at, each) for each in markers if (at := self._unread.find(each)) >= 0)
            at, found = min(places, default=(len(self._unread), ""))
            text = self._unread[:at]
            if found or self._is_over:
                certain = text.rstrip() if found == marker else text
            else:
                certain = text[: len(text) - max((overlap(text, each) for each in markers), default=0)]
                certain = certain if marker is None else certain.rstrip()
            if certain:
                self._parts.append(make(certain))
            if found == marker:
                self._taken = text[len(certain) :] + found
                self._unread = self._unread[at + len(found) :]
                return True
            self._unread = self._unread[len(certain) + len(found) :]
            if not found:
                if self._is_over:
                    return False
                yield

    def _give_back(self) -> None:
        """What was taken is text."""
        for marker in self._hidden:
            self._taken = self._taken.replace(marker, "")
        if self._taken:
            self._parts.append(TextPart(self._taken))

    def _sees(self, text: str) -> _Reading[bool]:
        """Whether what is unread begins so."""
        while not self._is_over and len(self._unread) < len(text) and text.startswith(self._unread):
            yield
        return self._unread.startswith(text)

    def _take(self, text: str) -> _Reading[bool]:
        """Take this text if it comes next."""
        is_next = yield from self._sees(text)
        if is_next:
            self._taken += text
            self._unread = self._unread[len(text) :]
        return is_next

    def _take_all(self, run: re.Pattern[str]) -> _Reading[str]:
        """Take what comes next as far as it is of this kind."""
        end = 0
        while True:
            found = run.match(self._unread, end)
            assert found is not None, "it may be empty"
            end = found.end()
            if self._is_over or end < len(self._unread):
                break
            yield
        taken, self._unread = self._unread[:end], self._unread[end:]
        self._taken += taken
        return taken


def _call_of(text: str) -> tuple[str, str]:
    """The name and the arguments in an object that is a call; the name is "" where it is none."""
    try:
        fields = from_json(text, allow_inf_nan=False)
        arguments = fields.get("arguments", fields.get("parameters"))
        if isinstance(arguments, str):  # JSON in JSON
            arguments = from_json(arguments or "{}", allow_inf_nan=False)
        written = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
    except ValueError:
        return "", ""
    name = fields.get("name", fields.get("function"))
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return "", ""
    return name, written
