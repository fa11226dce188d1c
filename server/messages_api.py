"""Anthropic's routes: /v1/messages, streaming and not, and /v1/messages/count_tokens.

Lives on the event loop; tokens are counted on a worker. A request is a chat completion in other words, and its answer's
parts become content blocks.
Source: Anthropic's API reference (messages, streaming).
"""

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.scheduler.messages import FinishReason
from headrace.server.answer_parts import Part, ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart, make_parser
from headrace.server.answering import AnswerWriter, Answering, answer_frames
from headrace.server.error_forms import anthropic_form
from headrace.server.errors import ApiError, InternalError
from headrace.server.generation import Generation
from headrace.server.generator import tokenize
from headrace.server.messages_protocol import FIELD_NAMES, CountTokensRequest, MessagesRequest
from headrace.server.protocol import parse_json_object, renaming, validate
from headrace.server.sse import EventStream, event_frame


class MessagesApi:
    """The routes of one model."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._generator = answering.generator

    async def create(self, request: Request, body: bytes) -> Response:
        asked, id = validate(MessagesRequest, parse_json_object(body)), request.state.id
        with renaming(FIELD_NAMES):
            params = asked.as_chat()
            [generation] = await self._answering.start(request, params, f"msg_{id}", len(body))
        assert self._generator.tokenizer is not None
        parser = make_parser(self._generator.tokenizer, params)
        writer = _MessageWriter(asked.model, generation, id)
        if asked.stream:
            frames = answer_frames(generation, parser, writer, self._generator.settings)
            return EventStream(frames, writer.failure(InternalError()))
        [piece] = await self._answering.whole([generation])
        return JSONResponse(writer.whole([*parser.push(piece.text), *parser.finish()]))

    async def count_tokens(self, request: Request, body: bytes) -> Response:
        asked = validate(CountTokensRequest, parse_json_object(body))
        with renaming(FIELD_NAMES):
            params = asked.as_chat()
            [prompt] = await self._generator.read(
                lambda tokenizer, ready: tokenize(tokenizer, params, ready.max_context_tokens),
                params.model,
                request.state.tenant,
                len(body),
            )
        return JSONResponse({"input_tokens": len(prompt.token_ids)})


class _MessageWriter(AnswerWriter):
    """Writes content blocks, each of parts of one kind in a row, or of one tool call."""

    heartbeat = event_frame("ping", {"type": "ping"}, id=None)

    def __init__(self, model: str, generation: Generation, request_id: str) -> None:
        self._model = model
        self._generation = generation
        self._request_id = request_id
        self._num_blocks = 0
        self._open_type: str | None = None
        self._has_calls = False

    def opening(self) -> bytes:
        message = self._message([], None, None, num_output_tokens=0)
        return _frame("message_start", message=message)

    def part(self, part: Part) -> bytes:
        block, delta = _block(part), _delta(part)
        frames = b""
        if block is not None and (isinstance(part, ToolCallPart) or block["type"] != self._open_type):
            frames = self._close_block() + _frame("content_block_start", index=self._num_blocks, content_block=block)
            self._num_blocks += 1
            self._open_type = block["type"]
        self._has_calls |= isinstance(part, ToolCallPart)
        if delta is not None:
            frames += _frame("content_block_delta", index=self._num_blocks - 1, delta=delta)
        return frames

    def closing(self) -> bytes:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        end = _frame("message_delta", delta=delta, usage=self._usage(self._generation.num_output_tokens))
        return self._close_block() + end + _frame("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event_frame("error", anthropic_form(error, self._request_id), id=None)

    def whole(self, parts: Iterable[Part]) -> dict[str, Any]:
        """The whole message."""
        blocks = []
        for part in parts:
            ...
