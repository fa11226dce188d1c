"""A response as it is made: its output items, and the events that tell of them.

Pure: events follow from the entries of a generation's log and from nothing else, an entry at a time, so that whoever
reads a response, and whenever, gets the same ones under the same numbers, after a restart too. None of them is kept.
What a text consists of is its parser's affair.
Source: OpenAI's API reference (responses, streaming events).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from headrace.scheduler.messages import TokenLogprobs
from headrace.server.answer_parts import AnswerParser, Part, ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.model_response import ModelResponse
from headrace.server.responses_protocol import function_call, message, output_text, reasoning
from headrace.server.sse import event_frame, padded
from headrace.server.stream_log import LogEntry

_FINAL_EVENTS = {"completed": "response.completed", "failed": "response.failed"}


class Event(NamedTuple):
    """`text` is what it adds to the output, where it adds any."""

    fields: dict[str, Any]
    text: str | None = None

    @property
    def number(self) -> int:
        number: int = self.fields["sequence_number"]
        return number

    def frame(self, padding: int) -> bytes:
        frame = event_frame(self.fields["type"], self.fields, id=None)
        if not padding or self.text is None:
            return frame
        return padded(frame, None if self.fields.get("logprobs") else self.text, padding)


@dataclass(slots=True)
class _OpenItem:
    """The output item that is being written."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """The one part that it has, where items of its type have parts."""
        text = "".join(self.texts)
        if self.type == "message":
            return output_text(text, self.logprobs)
        return {"type": "reasoning_text", "text": text}

    def whole(self, status: str) -> dict[str, Any]:
        match self.type:
            case "message":
                return message(self.id, "assistant", [self.content()], status)
            case "reasoning":
                return reasoning(self.id, "".join(self.texts), status)
            case "function_call":
                return function_call(self.id, self.call_id, self.name, "".join(self.texts), status)


class ResponseEvents:
    """Feed it `begin`, every entry of the log in order, then `finish` once the log has ended; each gives the events
    that follow. `logprobs_of` writes log probabilities as a message has them."""

    def __init__(
        self,
        response: ModelResponse,
        parser: AnswerParser,
        logprobs_of: Callable[[Sequence[TokenLogprobs]], list[Any]],
    ) -> None:
        self._response = response
        self._parser = parser
        self._logprobs_of = logprobs_of
        self._done: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._logprobs: list[TokenLogprobs] = []  # of text that the parser holds back
        self._is_reasoning = False
        self._num_unsettled_tokens = 0  # of text that the parser holds back too
        self._num_reasoning_tokens = 0
        self._is_finished = False
        self.num_events = 0

    def begin(self) -> Iterator[Event]:
        response = self._response
        if response.settings["background"]:
            yield self._event("response.created", response=response.unfinished([], "queued"))
            yield self._event("response.queued", response=response.unfinished([], "queued"))
        else:
            yield self._event("response.created", response=response.unfinished([], "in_progress"))
        yield self._event("response.in_progress", response=response.unfinished([], "in_progress"))

    def push(self, entry: LogEntry) -> Iterator[Event]:
        self._logprobs += entry.logprobs
        self._num_unsettled_tokens += entry.num_tokens
        yield from self._take_all(self._parser.push(entry.text) if entry.text else [])

    def finish(self) -> Iterator[Event]:
        yield from self._take_all(self._parser.finish())
        if self._is_reasoning:
            self._num_reasoning_tokens += self._num_unsettled_tokens
        status = self._response.final_status
        if status in ("completed", "incomplete") and not (self._done or self._open):
            yield from self._begin_item("message")
        if self._logprobs and self._open is not None and self._open.type == "message":
            yield from self._take(TextPart(""))
        yield from self._end_item("completed" if status == "completed" else "incomplete")
        self._is_finished = True
        yield self._event(_FINAL_EVENTS.get(status, "response.incomplete"), response=self.object())

    def object(self) -> dict[str, Any]:
        """The response with the output so far."""
        if self._is_finished:
            return self._response.finished(self._done, self._num_reasoning_tokens)
        open = [] if self._open is None else [self._open.whole("in_progress")]
        return self._response.unfinished([*self._done, *open])

    def _take_all(self, parts: Sequence[Part]) -> Iterator[Event]:
        for part in parts:
            yield from self._take(part)
        if parts:
            self._is_reasoning = isinstance(parts[-1], ReasoningPart)
            if self._is_reasoning:
                self._num_reasoning_tokens += self._num_unsettled_tokens
            self._num_unsettled_tokens = 0

    def _take(self, part: Part) -> Iterator[Event]:
        match part:
            case TextPart(text):
                yield from self._begin_item("message")
                assert self._open is not None
                logprobs = self._logprobs_of(self._logprobs) if self._logprobs else []
                self._open.logprobs += logprobs
                yield self._delta("response.output_text.delta", text, content_index=0, logprobs=logprobs)
            case ReasoningPart(text):
                yield from self._begin_item("reasoning")
                yield self._delta("response.reasoning_text.delta", text, content_index=0)
            case ToolCallPart(_, _, name):
                yield from self._end_item("completed")
                yield from self._begin_item("function_call", name)
            case ToolArgumentsPart(_, text):
                yield self._delta("response.function_call_arguments.delta", text)
        self._logprobs.clear()

    def _begin_item(self, type: Literal["message", "reasoning", "function_call"], name: str = "") -> Iterator[Event]:
        """Have an item of this type be open."""
        if self._open is not None and self._open.type == type:
            return
        yield from self._end_item("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[type]
        id = self._response.item_id
        index = len(self._done)
        self._open = item = _OpenItem(id(prefix, index), type, id("call", index), name)
        if type == "message":
            yield self._item_event("response.output_item.added", message(item.id, "assistant", [], "in_progress"))
        else:
            yield self._item_event("response.output_item.added", item.whole("in_progress"))
        if type != "function_call":
            yield self._place_event("response.content_part.added", content_index=0, part=item.content())

    def _end_item(self, status: str) -> Iterator[Event]:
        if (item := self._open) is None:
            return
        text = "".join(item.texts)
        match item.type:
            case "message":
                logprobs = item.logprobs
                yield self._place_event("response.output_text.done", content_index=0, text=text, logprobs=logprobs)
            case "reasoning":
                yield self._place_event("response.reasoning_text.done", content_index=0, text=text)
            case "function_call":
                yield self._place_event("response.function_call_arguments.done", name=item.name, arguments=text)
        if item.type != "function_call":
            yield self._place_event("response.content_part.done", content_index=0, part=item.content())
        whole = item.whole(status)
        yield self._item_event("response.output_item.done", whole)
        self._done.append(whole)
        self._open = None

    def _delta(self, type: str, text: str, **fields: Any) -> Event:
        assert self._open is not None
        self._open.texts.append(text)
        return self._place_event(type, **fields, delta=text)._replace(text=text)

    def _place_event(self, type: str, **fields: Any) -> Event:
        assert self._open is not None
        return self._event(type, item_id=self._open.id, output_index=len(self._done), **fields)

    def _item_event(self, type: str, item: dict[str, Any]) -> Event:
        return self._event(type, output_index=len(self._done), item=item)

    def _event(self, type: str, **fields: Any) -> Event:
        number, self.num_events = self.num_events, self.num_events + 1
        return Event({"type": type, **fields, "sequence_number": number})
