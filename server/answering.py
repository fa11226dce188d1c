"""How a request is answered by generations: started for it, followed to their ends, and ended with its response.

Lives on the event loop. Shared by the routes whose answers last as long as their connections: whatever ends a response
(its last event, an error in one generation, a disconnect) ends all that was started for it. Answers that consist of
parts are followed here too; how one is written is known to the route's own `AnswerWriter`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.server.answer_parts import AnswerParser, Part
from headrace.server.errors import ApiError, UnsupportedParameterError
from headrace.server.generation import Generation, Stages
from headrace.server.generator import Generator
from headrace.server.logprobs import IDS_PER_LOGPROB, make_off_loop
from headrace.server.protocol import FieldNames, GenerationParams, rename
from headrace.server.settings import Settings
from headrace.server.sse import padded
from headrace.server.stream_log import LogSlice, Subscriber
from headrace.server.tool_calls import find_reasoning
from headrace.server.tracing import Report, trace_context

# Of a whole answer, looked at for its parts in the time that a token's log probabilities take.
_CHARS_PER_LOGPROB = 1000


class Answering:
    """Starts what a response follows. `report` hears of every generation once its response is over too."""

    def __init__(self, generator: Generator, report: Report) -> None:
        self.generator = generator
        self._report = report

    @property
    def is_reasoning(self) -> bool:
        """Whether the model reasons before it answers."""
        tokenizer = self.generator.tokenizer
        return tokenizer is not None and find_reasoning(tokenizer.chat_template()) is not None

    def check_reasoning(self, param: str) -> None:
        """Raises: UnsupportedParameterError where the model does not reason, as the field `param` wants it to."""
        if self.generator.tokenizer is not None and not self.is_reasoning:
            raise UnsupportedParameterError(f"{param}: this model does not reason", param=param)

    async def start(self, request: Request, params: GenerationParams, id: str, num_bytes: int) -> list[Generation]:
        """Start a request's generations, which end with its response. Raises: ApiError."""
        stages, tenant = Stages(request.state.received_s), request.state.tenant
        generations = await self.generator.start(
            params, id, stages, tenant=tenant, hints=request.state.hints, num_bytes=num_bytes
        )
        request.state.is_accepted = True
        self.end_with(request, generations)
        return generations

    def end_with(self, request: Request, generations: list[Generation]) -> None:
        """Have generations end with the request's response, however that ends."""
        request.state.cleanup.callback(self._finish, generations, request)

    async def whole(self, generations: list[Generation]) -> list[LogSlice]:
        """All that each has produced, once all are over. Raises: ApiError, of the first that fails."""
        with Subscriber([generation.log for generation in generations]) as subscriber:
            num_open = len(generations)
            while num_open:
                piece = await subscriber.next()
                if piece is not None and piece.terminal is not None:
                    num_open -= 1
                    if piece.terminal.error is not None:
                        raise piece.terminal.error
        generations[0].stages.first_byte_s = self.generator.client.clock()
        return [generation.log.read() for generation in generations]

    def _finish(self, generations: list[Generation], request: Request) -> None:
        ends = [generation.log.terminal for generation in generations]
        # Where one choice failed the others end for its reason, and nobody left.
        error = next((end.error for end in ends if end is not None and end.error is not None), None)
        request.state.has_failed = error is not None
        for generation in generations:
            self.generator.client.cancel(generation, error)
        generations[0].stages.end_s = self.generator.client.clock()  # of the response, which outlasts the last token
        self._report(generations, request.scope["path"], trace_context(request.headers))


async def whole_response(make: Callable[[], Any], pieces: Sequence[LogSlice], num_prompt_ids: int = 0) -> Response:
    """The response of an answer that is whole, as `make` writes it out of these pieces and so many token ids: on a
    worker if that takes long."""
    weight = sum(weight_of(piece) + len(piece.text) // _CHARS_PER_LOGPROB for piece in pieces)
    return await make_off_loop(lambda: JSONResponse(make()), weight + num_prompt_ids // IDS_PER_LOGPROB)


def weight_of(piece: LogSlice) -> int:
    """What writing a piece costs, in log probabilities of a token."""
    return len(piece.logprobs) + len(piece.token_ids) // IDS_PER_LOGPROB


class AnswerWriter(ABC):
    """Writes one answer in its API's form, as it comes. `field_names` are what that calls the fields of completions."""

    # What is sent where nothing else was for long.
    heartbeat = b""

    def __init__(self, generation: Generation, settings: Settings, field_names: FieldNames) -> None:
        self.field_names = field_names
        self._generation = generation
        self._padding_bytes = settings.stream_padding_bytes

    @abstractmethod
    def opening(self) -> bytes:
        """What goes before the first text."""

    @abstractmethod
    def part(self, part: Part) -> bytes:
        """The frames of a part, none where there is more to come."""

    @abstractmethod
    def closing(self) -> bytes:
        """The end of an answer that is over."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """The end of an answer that fails."""

    def _padded(self, frame: bytes, text: str) -> bytes:
        """A frame that holds this text, as long as the settings want it."""
        return padded(frame, text, self._padding_bytes) if self._padding_bytes else frame


async def answer_frames(
    generation: Generation, parser: AnswerParser, writer: AnswerWriter, settings: Settings
) -> AsyncIterator[bytes]:
    """The frames of a streaming response of one answer; each item is one write, and may hold several frames."""
    stages = generation.stages
    with generation.log.subscribe(interval_s=settings.stream_interval_ms / 1000) as subscriber:
        while True:
            piece = await subscriber.next(settings.heartbeat_s)
            write = b""
            if piece is None:
                write = writer.heartbeat
            elif piece.text:
                if stages.first_byte_s is None:
                    stages.first_byte_s = time.monotonic()
                    write = writer.opening()
                write += b"".join(map(writer.part, parser.push(piece.text)))
            if piece is not None and piece.terminal is not None:
                if (error := piece.terminal.error) is not None:
                    rename(error, writer.field_names)
                    yield write + writer.failure(error)
                    return
                if stages.first_byte_s is None:
                    write = writer.opening()
                yield write + b"".join(map(writer.part, parser.finish())) + writer.closing()
                return
            if write:
                yield write
