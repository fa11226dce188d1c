"""OpenAI's generation routes: /v1/chat/completions, /v1/completions and /v1/models, streaming and not.

Lives on the event loop. A response follows the generation's log; whatever ends the response (its last event, a
disconnect) ends the generation. Frames are spliced from parts prepared once per response, so that a token costs little
more than the encoding of its text.
Source: OpenAI's API reference.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.scheduler.messages import FinishReason
from headrace.server.generation import Generation, Stages
from headrace.server.generator import Generator
from headrace.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
    StreamOptions,
    parse_json_object,
    parse_request,
)
from headrace.server.sse import HEARTBEAT, EventStream, data_frame, to_json
from headrace.server.tracing import Report, trace_context
from headrace.server.version import SYSTEM_FINGERPRINT

_DONE = b"data: [DONE]\n\n"


class OpenAIApi:
    """The routes of one model. `report` hears of every generation once its response is over too."""

    def __init__(self, generator: Generator, report: Report) -> None:
        self._generator = generator
        self._report = report
        self._created_s = int(time.time())

    async def chat_completions(self, request: Request, body: bytes) -> Response:
        params = parse_request(ChatCompletionRequest, parse_json_object(body))
        return await self._complete(request, params, _ChatFormat)

    async def completions(self, request: Request, body: bytes) -> Response:
        params = parse_request(CompletionRequest, parse_json_object(body))
        return await self._complete(request, params, _CompletionFormat)

    async def models(self, request: Request) -> Response:
        ready = self._generator.client.ready
        model = {
            "id": self._generator.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "headrace",
            "max_model_len": ready.max_context_tokens if ready else None,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _complete(self, request: Request, params: GenerationParams, make_format: "type[_Format]") -> Response:
        id = f"{make_format.id_prefix}{request.state.id}"
        generation = await self._generator.start(params, id, Stages(request.state.received_s))
        request.state.is_accepted = True
        request.state.cleanup.callback(self._finish, generation, request)
        format = make_format(id, self._generator.model_name)
        if params.stream:
            options = params.stream_options or StreamOptions()
            return EventStream(_frames(generation, format, options, self._generator.settings.heartbeat_s))
        with generation.log.subscribe() as subscriber:
            while (piece := await subscriber.next()) is None or piece.terminal is None:
                pass
        if piece.terminal.error is not None:
            raise piece.terminal.error
        generation.stages.first_byte_s = self._generator.client.clock()
        return JSONResponse(format.whole(generation.log.text(), piece.terminal.finish_reason, generation.usage()))

    def _finish(self, generation: Generation, request: Request) -> None:
        self._generator.client.cancel(generation)
        generation.stages.end_s = self._generator.client.clock()  # of the response, which outlasts the last token
        self._report(generation, request.url.path, trace_context(request.headers))


async def _frames(
    generation: Generation, format: "_Format", options: StreamOptions, heartbeat_s: float
) -> AsyncIterator[bytes]:
    """The frames of a streaming response; each item is one write, and may hold several frames."""
    format.prepare_frames(has_usage=bool(options.include_usage or options.continuous_usage_stats))
    is_continuous = bool(options.continuous_usage_stats)
    opening = format.opening_frame(generation.usage(0) if is_continuous else None)
    num_tokens = 0
    with generation.log.subscribe() as subscriber:
        while True:
            piece = await subscriber.next(heartbeat_s)
            if piece is None:
                yield HEARTBEAT
                continue
            num_tokens += piece.num_tokens
            write = b""
            if piece.text:
                write = opening + format.text_frame(piece.text, generation.usage(num_tokens) if is_continuous else None)
                opening = b""
                if generation.stages.first_byte_s is None:
                    generation.stages.first_byte_s = time.monotonic()
            if piece.terminal is None:
                yield write
                continue
            if piece.terminal.error is not None:
                yield write + data_frame(piece.terminal.error.envelope())
                return
            usage = generation.usage()
            write += opening + format.finish_frame(piece.terminal.finish_reason, usage if is_continuous else None)
            if options.include_usage:
                write += format.usage_frame(usage)
            yield write + _DONE
            return


class _Format(ABC):
    """How one route writes its answer: the object's head, and a choice around a text."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, id: str, model_name: str) -> None:
        self._head = {
            "id": id,
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    @abstractmethod
    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        """The one choice of a whole answer."""

    @abstractmethod
    def opening_choice(self) -> dict[str, Any] | None:
        """The choice of the chunk before the first text, None where the route has no such chunk."""

    @abstractmethod
    def chunk_choice(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        """A chunk's choice: with text, or as the last with a finish reason."""

    def whole(self, text: str, finish_reason: FinishReason, usage: dict[str, int]) -> dict[str, Any]:
        choice = self.choice(text, finish_reason.value)
        return {**self._head, "object": self.object, "choices": [choice], "usage": usage}

    def prepare_frames(self, *, has_usage: bool) -> None:
        """Encode what all of a stream's frames share. With `has_usage` every chunk has the field, null or not."""
        self._has_usage = has_usage
        # The text comes last but for numbers, so the last slot in the frame is the one meant.
        slot = '"@text@"'
        before, _, after = self._frame([self.chunk_choice("@text@", None)], None).decode().rpartition(slot)
        self._before_text, self._after_text = before.encode(), after.encode()

    def opening_frame(self, usage: dict[str, int] | None) -> bytes:
        choice = self.opening_choice()
        return b"" if choice is None else self._frame([choice], usage)

    def text_frame(self, text: str, usage: dict[str, int] | None) -> bytes:
        if usage is not None:
            return self._frame([self.chunk_choice(text, None)], usage)
        return self._before_text + to_json(text).encode() + self._after_text

    def finish_frame(self, finish_reason: FinishReason, usage: dict[str, int] | None) -> bytes:
        return self._frame([self.chunk_choice(None, finish_reason.value)], usage)

    def usage_frame(self, usage: dict[str, int]) -> bytes:
        return self._frame([], usage)

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        chunk: dict[str, Any] = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._has_usage:
            chunk["usage"] = usage
        return data_frame(chunk)


class _ChatFormat(_Format):
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def opening_choice(self) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class _CompletionFormat(_Format):
    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def opening_choice(self) -> dict[str, Any] | None:
        return None

    def chunk_choice(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish_reason}
