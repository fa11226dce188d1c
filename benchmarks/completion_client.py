"""Sends one OpenAI-shaped streaming request and writes down what came back, when.

Here is decided what counts: which event holds generated text, which end is a success, and which kind a failure is.
Speaks /v1/completions and /v1/chat/completions as Headrace, vLLM and llama.cpp serve them. Success is the body up to
`data: [DONE]`, without an error event and with some text; nothing is retried.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from headrace.benchmarks.http_client import HttpClient, HttpEnd
from headrace.benchmarks.measurement import Outcome, Timeline
from headrace.benchmarks.sse_parser import SseEvent, SseParser

SHED_STATUSES: Final = (429, 503)
_DETAIL_CHARACTERS: Final = 300
_REFUSAL_BYTES: Final = 65_536
_TEXT_FIELDS: Final = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class Endpoint(StrEnum):
    """The two request shapes; the value is the flag's."""

    CHAT = "chat"
    COMPLETIONS = "completions"

    @property
    def path(self) -> str:
        """Where it is served."""
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


@dataclass(frozen=True, slots=True)
class CompletionClient:
    """How requests are asked for; `model` None leaves the field out."""

    http: HttpClient
    endpoint: Endpoint
    model: str | None = None
    is_ignoring_eos: bool = True
    is_asking_continuous_usage: bool = False

    def request_body(self, prompt: str, max_tokens: int) -> bytes:
        """Encode one greedy streaming request."""
        stream_options = {"include_usage": True}
        if self.is_asking_continuous_usage:
            stream_options["continuous_usage_stats"] = True
        body: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": stream_options,
        }
        if self.model is not None:
            body["model"] = self.model
        if self.is_ignoring_eos:
            body["ignore_eos"] = True
        if self.endpoint is Endpoint.CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return json.dumps(body).encode()

    async def stream(self, body: bytes, timeline: Timeline) -> None:
        """Run one request into its timeline; what the server does wrong is an outcome there, never raised."""
        reading = StreamReading(timeline)
        try:
            end = await self.http.exchange("POST", self.endpoint.path, body, reading.read)
        except OSError as error:
            timeline.end(Outcome.FAILED, "connect", str(error))
            return
        timeline.written_s = end.written_s
        reading.conclude(end)

    async def first_model(self) -> str | None:
        """Ask the server for the first model it lists; None where it lists none.

        Raises:
            OSError: no connection could be opened.
        """
        answer = bytearray()
        end = await self.http.exchange("GET", "/v1/models", b"", lambda _status, chunk, _now_s: answer.extend(chunk))
        if end.status != 200:
            return None
        try:
            model = json.loads(answer)["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            return None
        return model if isinstance(model, str) else None


class StreamReading:
    """Reads one response into one timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._events = SseParser()
        self._refusal = bytearray()  # the body of an answer that is no stream
        self._fault: tuple[str, str] | None = None  # the first one: kind and detail
        self._is_done = False

    def read(self, status: int, chunk: bytes, now_s: float) -> None:
        """Take one read of the body."""
        if status != 200:
            if len(self._refusal) < _REFUSAL_BYTES:
                self._refusal += chunk
            return
        for event in self._events.feed(chunk):
            self._read_event(event, now_s)

    def conclude(self, end: HttpEnd) -> None:
        """Name the outcome. An earlier cause hides a later one: cut after its error event, it is an error event."""
        timeline = self._timeline
        if end.status not in (0, 200):
            outcome = Outcome.SHED if end.status in SHED_STATUSES else Outcome.FAILED
            timeline.end(outcome, f"http_{end.status}", _clipped(self._refusal))
        elif self._fault is not None:
            timeline.end(Outcome.FAILED, *self._fault)
        elif end.fault:
            timeline.end(Outcome.FAILED, "bad_http", _clipped(end.fault.encode()))
        elif not self._is_done:
            timeline.end(Outcome.FAILED, "no_done" if end.is_whole else "cut")
        elif not timeline.content_s:
            timeline.end(Outcome.FAILED, "no_text")
        else:
            timeline.end(Outcome.OK)

    def _read_event(self, event: SseEvent, now_s: float) -> None:
        if self._is_done:
            return
        if event.data.strip() == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            self._note_fault("error_event" if event.name == b"error" else "bad_event", event.data)
            return
        if event.name == b"error" or chunk.get("error") is not None:
            self._note_fault("error_event", event.data)
            return
        usage = chunk.get("usage")
        output_tokens: int | None = None
        if isinstance(usage, dict):
            output_tokens = _count(usage, "completion_tokens")
            if output_tokens is not None:
                self._timeline.output_tokens = output_tokens
            self._timeline.prompt_tokens = _count(usage, "prompt_tokens")
        if _holds_text(chunk):
            self._timeline.content_s.append(now_s)
            self._timeline.content_usage.append(output_tokens)

    def _note_fault(self, kind: str, detail: bytes) -> None:
        if self._fault is None:
            self._fault = (kind, _clipped(detail))


def _holds_text(chunk: dict[str, Any]) -> bool:
    """Whether the event holds generated text; a role-only chunk, a finish chunk and a usage chunk do not."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        if choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(delta.get(field) for field in _TEXT_FIELDS):
            return True
    return False


def _count(usage: dict[str, Any], field: str) -> int | None:
    value = usage.get(field)
    return value if isinstance(value, int) else None


def _clipped(detail: bytes | bytearray) -> str:
    return " ".join(detail.decode("utf-8", "replace").split())[:_DETAIL_CHARACTERS]
