"""Ollama's routes: /api/chat and /api/generate, streaming or not, and what tells of the models and the server.

Lives on the event loop. A request is a completion in other words. A stream is lines of JSON, one object each, and has
no form for silence.
Source: Ollama's API reference.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.scheduler.messages import FinishReason
from headrace.server.answer_parser import make_parser
from headrace.server.answer_parts import (
    AnswerParser,
    Part,
    PlainText,
    ReasoningPart,
    TextPart,
    ToolArgumentsPart,
    ToolCallPart,
    parse_arguments,
)
from headrace.server.answering import Answering, AnswerWriter, answer_frames, whole_response
from headrace.server.error_forms import ollama_form
from headrace.server.errors import ApiError, InternalError, ModelNotFoundError
from headrace.server.generation import Generation
from headrace.server.model_details import ModelDetails
from headrace.server.ollama_protocol import (
    FIELD_NAMES,
    PROMPT_FIELD_NAMES,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaParams,
    ShowRequest,
)
from headrace.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    FieldNames,
    parse_json_object,
    renaming,
    validate,
)
from headrace.server.settings import Settings
from headrace.server.sse import EventStream, line_frame
from headrace.server.version import VERSION

# The version of Ollama's API that is spoken here; clients ask for the server's to know what it can do.
_API_VERSION = "0.12.0"
# What a model's name ends with where it has no other tag.
_DEFAULT_TAG = ":latest"
# Nothing is unloaded.
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)

# Makes an object of an answer, which is not the last, of its model and what is new.
_MakeObject = Callable[..., dict[str, Any]]


class OllamaApi:
    """The routes of one model, whose `details` are set before the server is ready."""

    def __init__(self, answering: Answering) -> None:
        self.details = ModelDetails()
        self._answering = answering
        self._generator = answering.generator

    async def chat(self, request: Request, body: bytes) -> Response:
        """POST /api/chat."""
        asked = validate(OllamaChatRequest, parse_json_object(body))
        if not asked.messages:
            return self._loaded(asked.model, _chat_object)
        with renaming(FIELD_NAMES):
            params = asked.as_chat(self._served_name(asked.model))
            return await self._answer(request, asked, params, _chat_object, FIELD_NAMES, len(body))

    async def generate(self, request: Request, body: bytes) -> Response:
        """POST /api/generate."""
        asked = validate(OllamaGenerateRequest, parse_json_object(body))
        if not asked.prompt:
            return self._loaded(asked.model, _prompt_object)
        tokenizer = self._generator.tokenizer
        has_template = tokenizer is None or tokenizer.has_chat_template
        with renaming(PROMPT_FIELD_NAMES):
            params = asked.as_completion(self._served_name(asked.model), has_chat_template=has_template)
            return await self._answer(request, asked, params, _prompt_object, PROMPT_FIELD_NAMES, len(body))

    async def tags(self, request: Request) -> Response:
        """GET /api/tags: the models that there are."""
        return JSONResponse({"models": [self._model(name) for name in self._names]})

    async def running(self, request: Request) -> Response:
        """GET /api/ps: the models that are loaded."""
        ready = self._generator.client.ready
        if ready is None:
            return JSONResponse({"models": []})
        num_gpu_bytes = 0 if ready.gpu_uuid is None else self.details.num_bytes
        loaded = {
            "expires_at": _timestamp(_FOREVER),
            "size_vram": num_gpu_bytes,
            "context_length": ready.max_context_tokens,
        }
        return JSONResponse({"models": [self._model(name) | loaded for name in self._names]})

    async def show(self, request: Request, body: bytes) -> Response:
        """POST /api/show: what a model is and can."""
        asked = validate(ShowRequest, parse_json_object(body))
        model = asked.model or asked.name
        self._check_served(model)
        details, ready, tokenizer = self.details, self._generator.client.ready, self._generator.tokenizer
        assert ready is not None
        assert tokenizer is not None
        capabilities = ["completion"]
        if tokenizer.has_chat_template:
            capabilities.append("tools")
        if self._answering.is_reasoning:
            capabilities.append("thinking")
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": tokenizer.chat_template(),
                "details": self._details_of(self._served_name(model)),
                "model_info": {
                    "general.architecture": details.family,
                    "general.parameter_count": details.num_parameters,
                    f"{details.family}.context_length": ready.max_context_tokens,
                },
                "capabilities": capabilities,
                "modified_at": _timestamp(datetime.fromtimestamp(details.modified_s, UTC)),
            }
        )

    async def version(self, request: Request) -> Response:
        """GET /api/version."""
        return JSONResponse({"version": _API_VERSION, "headrace": VERSION})

    async def _answer(
        self,
        request: Request,
        asked: OllamaParams,
        params: ChatCompletionRequest | CompletionRequest,
        make_object: _MakeObject,
        field_names: FieldNames,
        num_bytes: int,
    ) -> Response:
        if asked.think:
            self._answering.check_reasoning("think")
        [generation] = await self._answering.start(request, params, request.state.id, num_bytes)
        assert self._generator.tokenizer is not None
        parser: AnswerParser = PlainText()
        if isinstance(params, ChatCompletionRequest):
            parser = make_parser(self._generator.tokenizer, params, begins_in_reasoning=generation.begins_in_reasoning)
        settings = self._generator.settings
        make = partial(make_object, asked.model or _tagged(self._generator.model_name))
        writer = _LineWriter(generation, settings, field_names, make)
        if asked.is_streamed:
            frames = answer_frames(generation, parser, writer, settings)
            return EventStream(frames, writer.failure(InternalError()), "application/x-ndjson")
        [piece] = await self._answering.whole([generation])
        return await whole_response(lambda: writer.whole([*parser.push(piece.text), *parser.finish()]), [piece])

    def _loaded(self, model: str | None, make_object: _MakeObject) -> Response:
        """The answer to a request that only wants its model loaded. Raises: ApiError where it is not."""
        self._check_served(model)
        return JSONResponse(
            make_object(model or _tagged(self._generator.model_name)) | {"done": True, "done_reason": "load"}
        )

    def _check_served(self, model: str | None) -> None:
        """Raises: ModelNotFoundError; UnavailableError while it is loading, or the server ends."""
        if self._served_name(model) not in self._names:
            raise ModelNotFoundError(f"the model `{model}` does not exist", param="model")
        self._generator.client.check_accepting()

    @property
    def _names(self) -> list[str]:
        """The model's name, and its adapters'."""
        return [self._generator.model_name, *self._generator.adapters]

    def _served_name(self, model: str | None) -> str:
        """The name that a model is served under, whether or not either has the default tag."""
        bare = (model or self._generator.model_name).removesuffix(_DEFAULT_TAG)
        return next((name for name in self._names if name.removesuffix(_DEFAULT_TAG) == bare), bare)

    def _details_of(self, name: str) -> dict[str, Any]:
        """What an adapter has is its model's."""
        details, base = self.details, self._generator.model_name
        millions = details.num_parameters / 1e6
        return {
            "parent_model": "" if name == base else base,
            "format": details.format,
            "family": details.family,
            "families": [details.family],
            "parameter_size": f"{millions:.2f}M" if millions < 1000 else f"{millions / 1000:.1f}B",
            "quantization_level": details.value_type,
        }

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "name": _tagged(name),
            "model": _tagged(name),
            "modified_at": _timestamp(datetime.fromtimestamp(self.details.modified_s, UTC)),
            "size": self.details.num_bytes,
            "digest": self.details.digest,
            "details": self._details_of(name),
        }


def _tagged(name: str) -> str:
    return name if ":" in name else name + _DEFAULT_TAG


def _chat_object(
    model: str, content: str = "", thinking: str = "", calls: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A part of a chat's answer, or all of it."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"model": model, "created_at": _timestamp(datetime.now(UTC)), "message": message, "done": False}


def _prompt_object(
    model: str, content: str = "", thinking: str = "", calls: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The same of a prompt's answer, in which nothing is called."""
    answer = {"model": model, "created_at": _timestamp(datetime.now(UTC)), "response": content, "done": False}
    return answer | ({"thinking": thinking} if thinking else {})


class _LineWriter(AnswerWriter):
    """Writes an object for each piece of text, and for each tool call once it is whole."""

    def __init__(
        self, generation: Generation, settings: Settings, field_names: FieldNames, make_object: _MakeObject
    ) -> None:
        super().__init__(generation, settings, field_names)
        self._make_object = make_object
        self._call: ToolCallPart | None = None
        self._arguments = ""

    def opening(self) -> bytes:
        return b""

    def part(self, part: Part) -> bytes:
        match part:
            case TextPart(text):
                return self._call_end() + self._padded(line_frame(self._make_object(text)), text)
            case ReasoningPart(text):
                return self._call_end() + self._padded(line_frame(self._make_object(thinking=text)), text)
            case ToolCallPart():
                ended, self._call = self._call_end(), part
                return ended
            case ToolArgumentsPart():
                self._arguments += part.text
        return b""

    def closing(self) -> bytes:
        return self._call_end() + line_frame(self._last(self._make_object()))

    def failure(self, error: ApiError) -> bytes:
        return line_frame(ollama_form(error))

    def whole(self, parts: Iterable[Part]) -> dict[str, Any]:
        """The whole answer."""
        parts = list(parts)
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
        thinking = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
        arguments: defaultdict[int, str] = defaultdict(str)
        for part in parts:
            if isinstance(part, ToolArgumentsPart):
                arguments[part.index] += part.text
        calls = [_call(part, arguments[part.index]) for part in parts if isinstance(part, ToolCallPart)]
        return self._last(self._make_object(content, thinking, calls))

    def _call_end(self) -> bytes:
        """The object of a call that is over, if there is one."""
        if self._call is None:
            return b""
        call, arguments = self._call, self._arguments
        self._call, self._arguments = None, ""
        return self._padded(line_frame(self._make_object(calls=[_call(call, arguments)])), arguments)

    def _last(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An object as the last one, with what is told of the whole answer; durations are nanoseconds."""
        generation = self._generation
        assert generation.log.terminal is not None
        timings, scheduled_s = generation.timings(), generation.stages.scheduled_s
        return answer | {
            "done": True,
            "done_reason": "length" if generation.log.terminal.finish_reason is FinishReason.LENGTH else "stop",
            "total_duration": _nanoseconds(timings["total_s"]),
            "load_duration": _nanoseconds(None if scheduled_s is None else scheduled_s - generation.stages.received_s),
            "prompt_eval_count": generation.num_prompt_tokens,
            "prompt_eval_duration": _nanoseconds(timings["prefill_s"]),
            "eval_count": generation.num_output_tokens,
            "eval_duration": _nanoseconds(timings["decode_s"]),
        }


def _call(call: ToolCallPart, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "function": {"name": call.name, "arguments": parse_arguments(arguments)}}


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0) * 1e9)


def _timestamp(at: datetime) -> str:
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")
