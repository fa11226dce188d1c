"""Native streams, made for the browser's EventSource: resumable, readable by several, cancelled by name.

Lives on the event loop. An event's id is "<stream id>:<cursor>", so that a reader that comes back with it gets exactly
what it missed; behind it stands how many restarts the stream has seen, if it has. The stream's id has 128 random bits;
whoever has it may read. With a journal a restart ends no stream: what was fed to its generation is fed to it again.
Source: WHATWG HTML, "Server-sent events", for reconnection and Last-Event-ID.
"""

import re
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.server.errors import (
    BadRequestError,
    InternalError,
    LostEventsError,
    NotAcceptableError,
    ShutdownError,
    UnauthorizedError,
)
from headrace.server.generation import Generation, usage
from headrace.server.generator import Generator
from headrace.server.logprobs import IDS_PER_LOGPROB, chat_logprobs, make_off_loop
from headrace.server.protocol import (
    UNSUPPORTED,
    WITHOUT_TOOLS,
    ChatCompletionRequest,
    CompletionRequest,
    Number,
    parse_json_object,
    parse_request,
)
from headrace.server.replicas import Replicas
from headrace.server.sse import HEARTBEAT, EventStream, event_frame, padded, retry_frame, to_json
from headrace.server.stream_registry import NativeStream, StreamRegistry
from headrace.server.stream_start import start_stream
from headrace.server.tickets import TICKET_TTL_S, Ticket, Tickets
from headrace.server.tracing import Report, trace_context

# How often a waiting reader is told its place in the queue.
_QUEUE_POLL_S = 1.0
# The longest grace time a request may ask for; without a reader for longer, it is `on_disconnect: continue`.
_MAX_GRACE_S = 3600

# Fields that stand in a query as they are; all others but `stop` do as JSON.
QUERY_TEXTS = ("prompt", "model", "user", "cache_salt", "on_disconnect")

OnDisconnect = Literal["cancel", "continue"]


class StreamChatRequest(ChatCompletionRequest):
    """Its answer is one text as the model writes it, reasoning included."""

    on_disconnect: OnDisconnect | None = None
    disconnect_grace_s: Number | None = Field(None, ge=0, le=_MAX_GRACE_S)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = ChatCompletionRequest.unsupported | WITHOUT_TOOLS

    @property
    def has_parts(self) -> bool:
        return False


class StreamCompletionRequest(CompletionRequest):
    on_disconnect: OnDisconnect | None = None
    disconnect_grace_s: Number | None = Field(None, ge=0, le=_MAX_GRACE_S)


_StreamParams = StreamChatRequest | StreamCompletionRequest


class NativeApi:
    """The routes under /v1/stream and /v1/streams. `report` hears of every generation that is over."""

    def __init__(
        self,
        generator: Generator,
        registry: StreamRegistry[NativeStream],
        tickets: Tickets,
        replicas: Replicas,
        report: Report,
    ) -> None:
        self._generator = generator
        self._client = generator.client
        self._settings = generator.settings
        self._registry = registry
        self._tickets = tickets
        self._replicas = replicas
        self._report = report

    async def create(self, request: Request, body: bytes) -> Response:
        """POST /v1/streams: start a stream, answer with where to read it."""
        fields = parse_json_object(body)
        # Every native stream streams; what an OpenAI body says of streaming has no meaning here.
        fields.pop("stream", None)
        fields.pop("stream_options", None)
        fields = {name: value for name, value in fields.items() if value is not None}
        if ("messages" in fields) == ("prompt" in fields):
            raise BadRequestError("exactly one of `messages` and `prompt` is required", param="messages")
        params: _StreamParams
        if "messages" in fields:
            params = parse_request(StreamChatRequest, fields)
        else:
            params = parse_request(StreamCompletionRequest, fields)
        stream = await self._start(request, params, len(body))
        urls = _urls(stream.id)
        content = {"id": stream.id, "created": stream.created_s, "model": stream.generation.model, **urls}
        prompt_ids = stream.generation.prompt_token_ids or ()
        if prompt_ids:
            content["prompt_token_ids"] = [*prompt_ids]
        answer = partial(JSONResponse, content, 201, {"location": urls["url"]})
        return await make_off_loop(answer, len(prompt_ids) // IDS_PER_LOGPROB)

    async def issue_ticket(self, request: Request) -> Response:
        """POST /v1/stream/tickets: what GET /v1/stream takes in place of a key. A body has no meaning here."""
        content = {"ticket": self._tickets.issue(request.state.tenant), "expires_in_s": TICKET_TTL_S}
        return JSONResponse(content, 201, {"cache-control": "no-store"})

    async def open(self, request: Request, body: bytes) -> Response:
        """GET /v1/stream: start a stream and read it in one step, or resume the one that Last-Event-ID or the ticket
        names."""
        if "text/event-stream" not in request.headers.get("accept", ""):
            # An image or a link on any page can make a GET, but none asks for an event stream.
            raise NotAcceptableError("accept must include text/event-stream")
        last_event_id = _last_event_id(request)
        if last_event_id:
            id, _, _ = last_event_id.rpartition(":")
            if not id:
                raise BadRequestError("last_event_id: names no stream", param="last_event_id")
            await self._replicas.reach(self._registry, request, id)
            return self._read(self._registry.get(id), last_event_id)
        ticket = self._shown_ticket(request)
        params = _params_from_query(request)
        if ticket is None:
            return self._read(await self._start(request, params), "")
        request.state.tenant = ticket.tenant
        async with ticket.lock:
            if ticket.stream_id is None:
                ticket.stream_id = (await self._start(request, params)).id
        return self._read(self._registry.get(ticket.stream_id), "")

    async def events(self, request: Request, body: bytes) -> Response:
        """GET /v1/streams/{id}/events."""
        id = request.path_params["id"]
        await self._replicas.reach(self._registry, request, id)
        return self._read(self._registry.get(id), _last_event_id(request))

    async def snapshot_or_cancel(self, request: Request, body: bytes) -> Response:
        """GET /v1/streams/{id}: what there is. DELETE: end it, harmless on one that is over; its readers get `done`.
        One that the next process goes on with is that one's to end."""
        id = request.path_params["id"]
        await self._replicas.reach(self._registry, request, id)
        stream = self._registry.get_owned(id, request.state.tenant)
        generation = stream.generation
        if request.method == "DELETE":
            self._replicas.check_own(self._registry, stream)
            await self._client.end(generation)
            if generation.is_interrupted:
                raise ShutdownError(is_resumable=True)
        return self._snapshot(stream)

    def _shown_ticket(self, request: Request) -> Ticket | None:
        """None where none is needed: a key was sent, or there are none.

        Raises: UnauthorizedError, OtherReplicaError.
        """
        shown = request.query_params.get("ticket")
        if shown is not None:
            self._replicas.check_ticket(request, shown)
            return self._tickets.show(shown)
        if self._settings.api_keys_file is not None and not request.state.tenant:
            raise UnauthorizedError("an API key is needed, or a ticket from POST /v1/stream/tickets")
        return None

    async def _start(self, request: Request, params: _StreamParams, num_bytes: int = 0) -> NativeStream:
        # Not the request's id, which is logged here and by proxies: a stream's id suffices to read it.
        id = self._replicas.new_id()
        if params.num_sequences > 1:
            raise BadRequestError("n: a native stream has one answer to one prompt", param="n")
        created_s = int(time.time())

        def make(generation: Generation) -> NativeStream:
            return NativeStream(
                id,
                request.state.tenant,
                generation,
                created_s,
                params.on_disconnect == "continue",
                unread_since_s=self._client.clock(),
                grace_s=params.disconnect_grace_s,
            )

        return await start_stream(
            self._generator,
            self._registry,
            request,
            params,
            make,
            partial(self.finish, id, route=request.scope["path"], context=trace_context(request.headers)),
            is_journaled=True,
            num_bytes=num_bytes,
        )

    def finish(
        self,
        id: str,
        generation: Generation,
        *,
        route: str = "/v1/streams",
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Keep a stream whose generation is over, and tell of its end."""
        self._registry.finish(id)
        self._report([generation], route, context or {})

    def _read(self, stream: NativeStream, last_event_id: str) -> Response:
        log = stream.generation.log
        cursor, num_restarts = _parse_cursor(stream.id, last_event_id)
        if not stream.has_kept(cursor, num_restarts):
            raise LostEventsError("a crash has lost some of what this reader was sent; what there is now may differ")
        if cursor > log.end:
            raise BadRequestError("last_event_id: lies in the future of this stream", param="last_event_id")
        if log.terminal is not None and cursor == log.end:
            return Response(status_code=204)  # tells EventSource to stop
        return EventStream(self._frames(stream, cursor), event_frame("error", InternalError().envelope(), id=None))

    async def _frames(self, stream: NativeStream, cursor: int) -> AsyncIterator[bytes]:
        """What one reader is sent; each item is one write."""
        generation, clock, settings = stream.generation, self._client.clock, self._settings
        padding = settings.stream_padding_bytes
        shown_position: int | None = None
        try:
            with self._registry.subscribe(stream, cursor, settings.stream_interval_ms / 1000) as subscriber:
                last_write_s = clock()
                yield retry_frame(settings.stream_retry_ms)
                while True:
                    timeout_s = settings.heartbeat_s
                    if generation.log.end == 0:
                        position, eta_s = self._client.queue_position(generation) or (0, None)
                        if position != shown_position:
                            shown_position, last_write_s = position, clock()
                            queued = {"position": position, "eta_s": eta_s}
                            yield event_frame("queued", queued, id=stream.event_id(0))
                        timeout_s = _QUEUE_POLL_S
                    piece = await subscriber.next(timeout_s)
                    if piece is None:
                        if clock() - last_write_s >= settings.heartbeat_s:
                            last_write_s = clock()
                            yield HEARTBEAT
                        continue
                    write = b""
                    if piece.text or piece.logprobs or piece.token_ids:
                        if generation.stages.first_byte_s is None:
                            generation.stages.first_byte_s = clock()
                        token: dict[str, Any] = {"text": piece.text, "num_tokens": piece.num_tokens}
                        if piece.logprobs:
                            assert self._generator.tokenizer is not None
                            make = partial(chat_logprobs, self._generator.tokenizer, piece.logprobs)
                            found = await make_off_loop(make, len(piece.logprobs))
                            token["logprobs"] = found["content"]
                        if piece.token_ids:
                            token["token_ids"] = [*piece.token_ids]
                        # The terminal entry is one of its own: a reader cut between the two gets it again.
                        end = piece.cursor - (piece.terminal is not None)
                        write = event_frame("token", token, id=stream.event_id(end))
                        if padding:
                            is_only_text = not (piece.logprobs or piece.token_ids)
                            write = padded(write, piece.text if is_only_text else None, padding)
                    if piece.terminal is not None:
                        yield write + self._terminal_frame(stream, piece.cursor)
                        return
                    last_write_s = clock()
                    yield write
        finally:
            self._registry.unsubscribed(stream, clock())

    def _terminal_frame(self, stream: NativeStream, cursor: int) -> bytes:
        generation = stream.generation
        assert generation.log.terminal is not None
        if (error := generation.log.terminal.error) is not None:
            if generation.is_interrupted:
                return event_frame("interrupted", error.envelope()["error"], id=stream.event_id(cursor - 1))
            return event_frame("error", error.envelope(), id=stream.event_id(cursor))
        done = {
            "finish_reason": generation.log.terminal.finish_reason.value,
            "usage": usage([generation]),
            "timings": generation.timings(),
        }
        return event_frame("done", done, id=stream.event_id(cursor))

    def _snapshot(self, stream: NativeStream) -> Response:
        generation, terminal = stream.generation, stream.generation.log.terminal
        status = "waiting" if generation.stages.scheduled_s is None else "running"
        if terminal is not None:
            status = "interrupted" if generation.is_interrupted else "finished"
        cursor = generation.log.end - generation.is_interrupted
        error = terminal.error if terminal else None
        content = {
            "id": stream.id,
            "object": "stream",
            "created": stream.created_s,
            "model": generation.model,
            "status": status,
            "text": generation.log.read().text,
            "cursor": cursor,
            "last_event_id": stream.event_id(cursor),
            "finish_reason": terminal.finish_reason.value if terminal and status == "finished" else None,
            "error": error.envelope()["error"] if error else None,
            "usage": usage([generation]),
            "timings": generation.timings(),
            **_urls(stream.id),
        }
        return JSONResponse(content, headers={"cache-control": "no-store"})


def _urls(id: str) -> dict[str, str]:
    return {"url": f"/v1/streams/{id}", "events_url": f"/v1/streams/{id}/events"}


def _last_event_id(request: Request) -> str:
    return request.headers.get("last-event-id") or request.query_params.get("last_event_id", "")


def _parse_cursor(id: str, last_event_id: str) -> tuple[int, int]:
    """The cursor in an event id of this stream, or in the bare form "<cursor>", and the restarts behind it; 0 where
    there is none.

    Raises: BadRequestError for anything else.
    """
    if not last_event_id:
        return 0, 0
    stream_id, separator, place = last_event_id.rpartition(":")
    found = re.fullmatch(r"([0-9]{1,11})(?:-([0-9]{1,9}))?", place)
    if found is None or (separator and stream_id != id):
        raise BadRequestError("last_event_id: not an event id of this stream", param="last_event_id")
    return int(found[1]), int(found[2] or 0)


def _params_from_query(request: Request) -> StreamCompletionRequest:
    """A completion's fields out of the query: text as it stands, all else as JSON. Raises: BadRequestError."""
    fields: dict[str, Any] = {}
    known = {*StreamCompletionRequest.model_fields, *UNSUPPORTED, *StreamCompletionRequest.unsupported}
    for name, value in request.query_params.items():
        if name not in known:
            continue
        if name == "stop":
            fields[name] = request.query_params.getlist(name)
        elif name in QUERY_TEXTS:
            fields[name] = value
        else:
            try:
                fields[name] = parse_json_object(f'{{"value":{value}}}'.encode()).get("value")
            except (BadRequestError, UnicodeEncodeError):
                raise BadRequestError(f"{name}: {to_json(value[:100])} is not a number or flag", param=name) from None
    fields.pop("stream", None)
    return parse_request(StreamCompletionRequest, fields)
