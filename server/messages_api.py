"""Anthropic's routes: /v1/messages, streaming and not, and /v1/messages/count_tokens.

Lives on the event loop; tokens are counted on a worker. A request is a chat completion in other words, and its answer's
parts become content blocks.
Source: Anthropic's API reference (messages, streaming, count tokens).
"""

import time
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.scheduler.messages import FinishReason
from headrace.server.answer_parser import make_parser
from headrace.server.answer_parts import (
    Part,
    ReasoningPart,
    TextPart,
    ToolArgumentsPart,
    ToolCallPart,
    parse_arguments,
)
from headrace.server.answering import Answering, AnswerWriter, answer_frames, whole_response
from headrace.server.error_forms import anthropic_form
from headrace.server.errors import ApiError, InternalError
from headrace.server.generation import Generation
from headrace.server.generator import tokenize
from headrace.server.messages_protocol import FIELD_NAMES, CountTokensRequest, MessagesRequest
from headrace.server.protocol import ChatCompletionRequest, parse_json_object, renaming, validate
from headrace.server.request_log import log_answered
from headrace.server.settings import Settings
from headrace.server.sse import EventStream, event_frame


class MessagesApi:
    """The routes of one model."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._generator = answering.generator

    async def create(self, request: Request, body: bytes) -> Response:
        asked, id = validate(MessagesRequest, parse_json_object(body)), request.state.id
        settings, tokenizer = self._generator.settings, self._generator.tokenizer
        with renaming(FIELD_NAMES):
            params = self._as_chat(asked)
            [generation] = await self._answering.start(request, params, f"msg_{id}", len(body))
            assert tokenizer is not None
            parser = make_parser(tokenizer, params, begins_in_reasoning=generation.begins_in_reasoning)
            writer = _MessageWriter(generation, settings, asked.model or self._generator.model_name, id)
            if asked.stream:
                return EventStream(answer_frames(generation, parser, writer, settings), writer.failure(InternalError()))
            [piece] = await self._answering.whole([generation])
            return await whole_response(lambda: writer.whole([*parser.push(piece.text), *parser.finish()]), [piece])

    async def count_tokens(self, request: Request, body: bytes) -> Response:
        asked, state = validate(CountTokensRequest, parse_json_object(body)), request.state
        with renaming(FIELD_NAMES):
            params = self._as_chat(asked)
            [prompt] = await self._generator.read(
                lambda tokenizer, ready: tokenize(tokenizer, params, ready.max_context_tokens),
                params.model,
                state.tenant,
                len(body),
            )
        state.is_accepted = True
        stages = {"received_s": state.received_s, "end_s": time.monotonic()}
        log_answered(state.id, request.scope["path"], 1, len(prompt.token_ids), stages)
        return JSONResponse({"input_tokens": len(prompt.token_ids)})

    def _as_chat(self, asked: CountTokensRequest) -> ChatCompletionRequest:
        """Raises: ApiError."""
        if asked.has_thinking:
            self._answering.check_reasoning("thinking")
        return asked.as_chat()


class _MessageWriter(AnswerWriter):
    """Writes content blocks, each of parts of one kind in a row or of a tool call. A text block's text and a thinking
    block's thinking are in fields of these names."""

    heartbeat = event_frame("ping", {"type": "ping"}, id=None)

    def __init__(self, generation: Generation, settings: Settings, model: str, request_id: str) -> None:
        super().__init__(generation, settings, FIELD_NAMES)
        self._model = model
        self._request_id = request_id
        self._num_blocks = 0
        self._block_type = ""
        self._has_calls = False

    def opening(self) -> bytes:
        return _frame("message_start", message=self._message([], None, None))

    def part(self, part: Part) -> bytes:
        frames = b""
        if (block := self._next_block(part)) is not None:
            frames = self._block_end() + _frame("content_block_start", index=self._num_blocks, content_block=block)
            self._num_blocks += 1
        if isinstance(part, ToolCallPart):
            return frames
        if isinstance(part, ToolArgumentsPart):
            delta = {"type": "input_json_delta", "partial_json": part.text}
        else:
            delta = {"type": f"{self._block_type}_delta", self._block_type: part.text}
        frame = _frame("content_block_delta", index=self._num_blocks - 1, delta=delta)
        return frames + self._padded(frame, part.text)

    def closing(self) -> bytes:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        end = _frame("message_delta", delta=delta, usage=self._usage())
        return self._block_end() + end + _frame("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event_frame("error", anthropic_form(error, self._request_id), id=None)

    def whole(self, parts: Iterable[Part]) -> dict[str, Any]:
        """The whole message."""
        content: list[dict[str, Any]] = []
        texts: list[list[str]] = []
        for part in parts:
            if (block := self._next_block(part)) is not None:
                content.append(block)
                texts.append([])
            if not isinstance(part, ToolCallPart):
                texts[-1].append(part.text)
        for block, pieces in zip(content, texts, strict=True):
            text = "".join(pieces)
            if block["type"] == "tool_use":
                block["input"] = parse_arguments(text)
            else:
                block[block["type"]] = text
        return self._message(content, *self._stop())

    def _next_block(self, part: Part) -> dict[str, Any] | None:
        """The block that begins with a part, None where the last one goes on."""
        if isinstance(part, ToolArgumentsPart):
            return None
        if isinstance(part, ToolCallPart):
            self._block_type, self._has_calls = "tool_use", True
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        type = "text" if isinstance(part, TextPart) else "thinking"
        if type == self._block_type:
            return None
        self._block_type = type
        # The signature is what another server would know its own thinking by.
        return {"type": type, type: ""} | ({"signature": ""} if isinstance(part, ReasoningPart) else {})

    def _block_end(self) -> bytes:
        return _frame("content_block_stop", index=self._num_blocks - 1) if self._num_blocks else b""

    def _message(self, content: list[dict[str, Any]], reason: str | None, sequence: str | None) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        """Why the answer ended, and the stop sequence that it did at."""
        generation = self._generation
        assert generation.log.terminal is not None
        if generation.log.terminal.finish_reason is FinishReason.LENGTH:
            return "max_tokens", None
        if (sequence := generation.detokenizer.stop_string) is not None:
            return "stop_sequence", sequence
        return "tool_use" if self._has_calls else "end_turn", None

    def _usage(self) -> dict[str, int]:
        generation = self._generation
        return {
            "input_tokens": generation.num_prompt_tokens - generation.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": generation.num_cached_tokens,
            "output_tokens": generation.num_output_tokens,
        }


def _frame(type: str, **fields: Any) -> bytes:
    return event_frame(type, {"type": type, **fields}, id=None)
