"""OpenAI's generation routes: /v1/chat/completions, /v1/completions and /v1/models, streaming and not.

Lives on the event loop. A response follows its generations' logs, one per choice. Frames are spliced from parts
prepared once per response, so that a token costs little more than the encoding of its text.
Source: OpenAI's API reference.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.scheduler.messages import FinishReason
from headrace.server.answer_parser import is_only_text, make_parser
from headrace.server.answer_parts import Part, ReasoningPart, TextPart, ToolArgumentsPart, ToolCallPart
from headrace.server.answering import Answering, weight_of, whole_response
from headrace.server.errors import ModelNotFoundError
from headrace.server.generation import Generation, final_usage, usage
from headrace.server.logprobs import IDS_PER_LOGPROB, chat_logprobs, completion_logprobs, make_off_loop
from headrace.server.one_shot_models import OneShots
from headrace.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationParams,
    StreamOptions,
    parse_json_object,
    parse_request,
)
from headrace.server.settings import Settings
from headrace.server.sse import HEARTBEAT, OBFUSCATED_BYTES, EventStream, data_frame, padded, to_json
from headrace.server.stream_log import LogSlice, Subscriber
from headrace.server.tokenizer import Tokenizer
from headrace.server.version import SYSTEM_FINGERPRINT

_DONE = b"data: [DONE]\n\n"


class OpenAIApi:
    """The routes of one model."""

    def __init__(self, answering: Answering, one_shots: OneShots) -> None:
        self._answering = answering
        self._generator = answering.generator
        self._one_shots = one_shots
        self._created_s = int(time.time())

    async def chat_completions(self, request: Request, body: bytes) -> Response:
        params = parse_request(ChatCompletionRequest, parse_json_object(body))
        return await self._complete(request, params, _ChatFormat, len(body))

    async def completions(self, request: Request, body: bytes) -> Response:
        params = parse_request(CompletionRequest, parse_json_object(body))
        return await self._complete(request, params, _CompletionFormat, len(body))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, request: Request, body: bytes) -> Response:
        """GET /v1/models/{id}, whose id may have slashes."""
        id = request.path_params["id"]
        for model in self._models():
            if model["id"] == id:
                return JSONResponse(model)
        raise ModelNotFoundError(f"the model `{id[:200]}` does not exist", param="model")

    def _models(self) -> list[dict[str, Any]]:
        ready = self._generator.client.ready
        context = ready.max_context_tokens if ready else None
        base = self._generator.model_name
        models = [
            (base, "generate", context, None),
            *((name, "generate", context, base) for name in self._generator.adapters),
        ]
        for model in self._one_shots.models:
            models.append((model.name, model.task.value, getattr(model.reader, "max_tokens", None), None))
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created_s,
                "owned_by": "headrace",
                "task": task,
                "max_model_len": max_tokens,
                "root": parent or name,
                "parent": parent,
            }
            for name, task, max_tokens, parent in models
        ]

    async def _complete(
        self, request: Request, params: GenerationParams, format_kind: "type[_Format]", num_bytes: int
    ) -> Response:
        id = f"{format_kind.id_prefix}{request.state.id}"
        generations = await self._answering.start(request, params, id, num_bytes)
        tokenizer = self._generator.tokenizer
        assert tokenizer is not None
        kind = format_kind.kind_for(tokenizer, params)
        format = kind(id, generations[0].model, tokenizer, params, generations)
        if params.stream:
            options = params.stream_options or StreamOptions()
            return EventStream(_frames(generations, format, options, self._generator.settings))
        pieces = await self._answering.whole(generations)
        return await whole_response(
            lambda: format.whole(pieces, final_usage(generations)), pieces, format.num_prompt_ids
        )


async def _frames(
    generations: list[Generation], format: "_Format", options: StreamOptions, settings: Settings
) -> AsyncIterator[bytes]:
    """The frames of a streaming response; each item is one write, and may hold several frames."""
    padding = settings.stream_padding_bytes or (OBFUSCATED_BYTES if options.include_obfuscation else 0)
    has_usage = bool(options.include_usage or options.continuous_usage_stats)
    format.prepare_frames(has_usage=has_usage, padding=padding)
    is_continuous = bool(options.continuous_usage_stats)
    counts = usage(generations, 0) if is_continuous else None
    opening = await make_off_loop(partial(format.opening_frames, counts), format.num_prompt_ids // IDS_PER_LOGPROB)
    stages = generations[0].stages
    num_tokens = [0] * len(generations)
    num_open = len(generations)
    logs = [generation.log for generation in generations]
    with Subscriber(logs, interval_s=settings.stream_interval_ms / 1000) as subscriber:
        while num_open:
            piece = await subscriber.next(settings.heartbeat_s)
            if piece is None:
                yield HEARTBEAT
                continue
            num_tokens[piece.log_index] += piece.num_tokens
            write = b""
            if piece.text or piece.logprobs or piece.token_ids:
                counts = usage(generations, sum(num_tokens)) if is_continuous else None
                if weight := weight_of(piece):  # most have none, and should not cost a coroutine each
                    frames = await make_off_loop(partial(format.text_frames, piece, counts), weight)
                else:
                    frames = format.text_frames(piece, counts)
                if frames:
                    write, opening = opening + frames, b""
                    if stages.first_byte_s is None:
                        stages.first_byte_s = time.monotonic()
            if piece.terminal is not None:
                if piece.terminal.error is not None:
                    yield write + data_frame(piece.terminal.error.envelope())
                    return
                num_open -= 1
                # More than its text was made of, by such as the token that ended it.
                num_tokens[piece.log_index] = generations[piece.log_index].num_output_tokens
                counts = usage(generations, sum(num_tokens)) if is_continuous else None
                write += opening + format.finish_frames(piece.log_index, piece.terminal.finish_reason, counts)
                opening = b""
            if num_open == 0:
                if options.include_usage:
                    write += format.usage_frame(final_usage(generations))
                write += _DONE
            if write:  # else all there is may be a part of a marker
                yield write


class _Format(ABC):
    """How one route writes its answer: the object's head, and a choice around a text."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(
        self,
        id: str,
        model_name: str,
        tokenizer: Tokenizer,
        params: GenerationParams,
        generations: Sequence[Generation],
    ) -> None:
        self._head = {
            "id": id,
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._tokenizer = tokenizer
        self._num_choices = params.num_sequences
        self._has_logprobs = params.num_logprobs is not None
        # Each choice's, where token ids are told.
        self._prompts = [ids for generation in generations if (ids := generation.prompt_token_ids) is not None]

    @classmethod
    def kind_for(cls, tokenizer: Tokenizer, params: GenerationParams) -> "type[_Format]":
        """The format of what may be in such an answer."""
        return cls

    @property
    def num_prompt_ids(self) -> int:
        """How many of the prompts' tokens are told."""
        return sum(map(len, self._prompts))

    @abstractmethod
    def choice(self, piece: LogSlice) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def opening_choice(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk before the first text, None where the route has no such chunk."""

    @abstractmethod
    def chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A chunk's choice: with text, or as the last with a finish reason."""

    @abstractmethod
    def logprobs(self, piece: LogSlice) -> dict[str, Any] | None:
        """The log probabilities of a piece, None where none were asked for."""

    def whole(self, pieces: list[LogSlice], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            self.choice(piece._replace(log_index=index)) | self._ids(piece.token_ids) | self.prompt_ids(index)
            for index, piece in enumerate(pieces)
        ]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage, **self.prompt_ids(None)}

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The field of a choice's tokens, where token ids are told."""
        return {"token_ids": [*token_ids]} if self._prompts else {}

    @abstractmethod
    def prompt_ids(self, index: int | None) -> dict[str, Any]:
        """The field of a prompt's tokens in a choice, or in the object around choices, where it is there."""

    def prepare_frames(self, *, has_usage: bool, padding: int) -> None:
        """Encode what all of a stream's frames share. With `has_usage` every chunk has the field, null or not; with
        `padding` texts are padded to a multiple of it."""
        self._has_usage = has_usage
        self._padding = padding
        # The text comes last but for numbers, so the last slot in the frame is the one meant.
        slot = '"@text@"'
        self._around_text: list[tuple[bytes, bytes]] = []
        for index in range(self._num_choices):
            before, _, after = self._frame([self.chunk_choice(index, "@text@", None)], None).decode().rpartition(slot)
            self._around_text.append((before.encode(), after.encode()))

    def opening_frames(self, usage: dict[str, Any] | None) -> bytes:
        choices = [self.opening_choice(index) for index in range(self._num_choices)]
        opening = [choice for choice in choices if choice is not None]
        return b"".join(
            self._frame([choice], usage, {} if i else self.prompt_ids(None)) for i, choice in enumerate(opening)
        )

    def text_frames(self, piece: LogSlice, usage: dict[str, Any] | None) -> bytes:
        if usage is not None or self._has_logprobs or self._prompts:
            choice = self.chunk_choice(piece.log_index, piece.text, None, self.logprobs(piece))
            frame = self._frame([choice | self._ids(piece.token_ids)], usage)
        else:
            before, after = self._around_text[piece.log_index]
            frame = before + to_json(piece.text).encode() + after
        if self._padding:
            is_only_text = not (piece.logprobs or piece.token_ids)
            frame = padded(frame, piece.text if is_only_text else None, self._padding)
        return frame

    def finish_frames(self, index: int, finish_reason: FinishReason, usage: dict[str, Any] | None) -> bytes:
        return self._frame([self.chunk_choice(index, None, finish_reason.value)], usage)

    def usage_frame(self, usage: dict[str, Any]) -> bytes:
        return self._frame([], usage)

    def _frame(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, fields: dict[str, Any] | None = None
    ) -> bytes:
        chunk: dict[str, Any] = {**self._head, "object": self.chunk_object, "choices": choices, **(fields or {})}
        if self._has_usage:
            chunk["usage"] = usage
        return data_frame(chunk)


class _ChatFormat(_Format):
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    @classmethod
    def kind_for(cls, tokenizer: Tokenizer, params: GenerationParams) -> "type[_Format]":
        assert isinstance(params, ChatCompletionRequest)
        return cls if is_only_text(tokenizer, params) else _PartsFormat

    def prompt_ids(self, index: int | None) -> dict[str, Any]:
        return {"prompt_token_ids": [*self._prompts[0]]} if self._prompts and index is None else {}

    def choice(self, piece: LogSlice) -> dict[str, Any]:
        assert piece.terminal is not None
        return {
            "index": piece.log_index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self.logprobs(piece),
            "finish_reason": piece.terminal.finish_reason.value,
        }

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, piece: LogSlice) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, piece.logprobs) if self._has_logprobs else None


class _PartsFormat(_ChatFormat):
    """A chat whose answers may have more parts than text. Each is a frame of its own."""

    def __init__(
        self,
        id: str,
        model_name: str,
        tokenizer: Tokenizer,
        params: GenerationParams,
        generations: Sequence[Generation],
    ) -> None:
        assert isinstance(params, ChatCompletionRequest)
        super().__init__(id, model_name, tokenizer, params, generations)
        self._parsers = [
            make_parser(tokenizer, params, begins_in_reasoning=generation.begins_in_reasoning)
            for generation in generations
        ]
        self._calling: set[int] = set()  # the choices that have made a call

    def choice(self, piece: LogSlice) -> dict[str, Any]:
        assert piece.terminal is not None
        parser = self._parsers[piece.log_index]
        message = _message([*parser.push(piece.text), *parser.finish()])
        if "tool_calls" in message:
            self._calling.add(piece.log_index)
        reason = self._finish_reason(piece.log_index, piece.terminal.finish_reason)
        logprobs = self.logprobs(piece)
        return {"index": piece.log_index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        return self._part_choice(index, {"role": "assistant", "content": None})

    def text_frames(self, piece: LogSlice, usage: dict[str, Any] | None) -> bytes:
        parts = self._parsers[piece.log_index].push(piece.text)
        if len(parts) == 1 and isinstance(parts[0], TextPart):
            return super().text_frames(piece._replace(text=parts[0].text), usage)
        fields = {"logprobs": self.logprobs(piece)} if piece.logprobs else {}
        if piece.token_ids:
            fields |= self._ids(piece.token_ids)
        return self._part_frames(piece.log_index, parts, usage, fields)

    def finish_frames(self, index: int, finish_reason: FinishReason, usage: dict[str, Any] | None) -> bytes:
        frames = self._part_frames(index, self._parsers[index].finish(), usage, {})
        reason = self._finish_reason(index, finish_reason)
        return frames + self._frame([self.chunk_choice(index, None, reason)], usage)

    def _part_frames(
        self, index: int, parts: list[Part], usage: dict[str, Any] | None, fields: dict[str, Any]
    ) -> bytes:
        """A frame for each part. Further fields of the choice are in the first, or in one of their own."""
        frames = b""
        deltas = [_delta(part) for part in parts]
        for delta in deltas or ([{}] if fields else []):
            frame = self._frame([self._part_choice(index, delta) | fields], usage)
            frames += padded(frame, None, self._padding) if self._padding else frame
            fields = {}
        if any(isinstance(part, ToolCallPart) for part in parts):
            self._calling.add(index)
        return frames

    def _part_choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _finish_reason(self, index: int, reason: FinishReason) -> str:
        return "tool_calls" if reason is FinishReason.STOP and index in self._calling else reason.value


def _delta(part: Part) -> dict[str, Any]:
    """What a part adds to a message."""
    match part:
        case TextPart(text):
            return {"content": text}
        case ReasoningPart(text):
            return {"reasoning_content": text}
        case ToolCallPart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolArgumentsPart(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(parts: list[Part]) -> dict[str, Any]:
    """A whole message. Its content is null where there is nothing but calls."""
    content, reasoning, calls = "", "", list[dict[str, Any]]()
    for part in parts:
        match part:
            case TextPart(text):
                content += text
            case ReasoningPart(text):
                reasoning += text
            case ToolCallPart(_, id, name):
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": ""}})
            case ToolArgumentsPart(index, text):
                calls[index]["function"]["arguments"] += text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


class _CompletionFormat(_Format):
    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        id: str,
        model_name: str,
        tokenizer: Tokenizer,
        params: GenerationParams,
        generations: Sequence[Generation],
    ) -> None:
        super().__init__(id, model_name, tokenizer, params, generations)
        self._skip_special_tokens = params.skips_special_tokens
        self._offsets = [0] * params.num_sequences

    def choice(self, piece: LogSlice) -> dict[str, Any]:
        assert piece.terminal is not None
        return self.chunk_choice(piece.log_index, piece.text, piece.terminal.finish_reason.value, self.logprobs(piece))

    def opening_choice(self, index: int) -> dict[str, Any] | None:
        return self.chunk_choice(index, None, None) | self.prompt_ids(index) if self._prompts else None

    def prompt_ids(self, index: int | None) -> dict[str, Any]:
        return {"prompt_token_ids": [*self._prompts[index]]} if self._prompts and index is not None else {}

    def chunk_choice(
        self, index: int, text: str | None, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, piece: LogSlice) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        logprobs, self._offsets[piece.log_index] = completion_logprobs(
            self._tokenizer,
            piece.logprobs,
            self._offsets[piece.log_index],
            skip_special_tokens=self._skip_special_tokens,
        )
        return logprobs
