"""OpenAI's /v1/responses: made, read again from any event on, continued by the next one, cancelled, deleted.

Lives on the event loop. A response is a chat completion in other words. One that is stored is kept like a native
stream, and one in the background outlives its client, and with a journal the process; any other ends when its client
leaves. Only its owner may read it.
Source: OpenAI's API reference (responses).
"""

import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import anyio.lowlevel
from pydantic import BaseModel, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.server.answer_parser import make_parser
from headrace.server.answering import Answering
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    GoneError,
    InternalError,
    NotFoundError,
    PreviousResponseNotFoundError,
    ShutdownError,
)
from headrace.server.generation import Generation
from headrace.server.logprobs import chat_logprobs, make_off_loop
from headrace.server.model_response import ID_PREFIX, ModelResponse, weight
from headrace.server.protocol import StreamOptions, parse_json_object, renaming, validate
from headrace.server.replicas import Replicas
from headrace.server.response_events import Event, ResponseEvents
from headrace.server.responses_protocol import (
    FIELD_NAMES,
    ItemReference,
    ResponseParams,
    ResponsesRequest,
    as_input,
)
from headrace.server.sse import HEARTBEAT, OBFUSCATED_BYTES, EventStream, event_frame
from headrace.server.stream_registry import StreamRegistry
from headrace.server.stream_start import start_stream
from headrace.server.tracing import Report, trace_context

# Entries of a log between which others have their turn.
_NUM_AT_ONCE = 16
# An item's id, of which the first part names the response.
_ITEM_ID = re.compile("[a-z]{2,3}_((?:[a-z0-9-]{1,32}-)?[0-9a-f]{32})_[io][0-9]{1,5}")


def _flag(text: Any) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _digits(text: Any) -> Any:
    return int(text) if isinstance(text, str) and re.fullmatch("[0-9]{1,11}", text) else text


_QueryFlag = Annotated[bool, Field(strict=True), BeforeValidator(_flag)]


class RetrieveQuery(BaseModel):
    stream: _QueryFlag = False
    starting_after: Annotated[int, Field(strict=True, ge=0), BeforeValidator(_digits)] | None = None
    include_obfuscation: _QueryFlag = False


class ItemsQuery(BaseModel):
    after: str | None = None
    limit: Annotated[int, Field(strict=True, ge=1, le=100), BeforeValidator(_digits)] = 20
    order: Literal["asc", "desc"] = "desc"


class ResponsesApi:
    """The routes of one model. `report` hears of every response's generation that is over."""

    def __init__(
        self, answering: Answering, registry: StreamRegistry[ModelResponse], replicas: Replicas, report: Report
    ) -> None:
        self._answering = answering
        self._generator = answering.generator
        self._client = answering.generator.client
        self._settings = answering.generator.settings
        self._registry = registry
        self._replicas = replicas
        self._report = report

    async def create(self, request: Request, body: bytes) -> Response:
        """POST /v1/responses."""
        fields = parse_json_object(body)
        asked = validate(ResponsesRequest, fields)
        id = ID_PREFIX + self._replicas.new_id()
        items = await self._asked_items(request, asked, id)
        with renaming(FIELD_NAMES):
            params = asked.as_chat(fields, items)
            settings = {**asked.settings(), **params.settings()}
            # What was validated is about as large as what is said of it.
            num_own_bytes = await make_off_loop(lambda: weight([items, settings, settings]), len(body) // 1024)
            created_s = int(time.time())

            def make(generation: Generation) -> ModelResponse:
                return ModelResponse(
                    id,
                    request.state.tenant,
                    generation,
                    created_s,
                    continues_alone=True,
                    unread_since_s=None,
                    num_own_bytes=num_own_bytes,
                    items=items,
                    settings=settings | {"model": generation.model},
                    params=params.model_copy(update={"messages": []}),
                )

            response = await self._start(request, asked, params, id, make, len(body))
            if not (params.stream or asked.background):
                await self._answering.whole([response.generation])
        if params.stream:
            options = params.stream_options or StreamOptions()
            return self._stream(response, -1, has_obfuscation=bool(options.include_obfuscation))
        return JSONResponse(await self._object(response))

    async def retrieve_or_delete(self, request: Request, body: bytes) -> Response:
        """GET /v1/responses/{id}: the response as it stands, or all its events behind one of them. DELETE: end and
        forget it."""
        response = await self._owned(request)
        if request.method == "DELETE":
            self._replicas.check_own(self._registry, response)
            await self._end(response)
            self._registry.forget(await self._owned(request))  # unless another has
            return JSONResponse({"id": response.id, "object": "response", "deleted": True})
        query = validate(RetrieveQuery, dict(request.query_params))
        if not query.stream:
            return JSONResponse(await self._object(response), headers={"cache-control": "no-store"})
        starting_after = -1 if query.starting_after is None else query.starting_after
        if starting_after >= (await self._made(response)).num_events:
            raise BadRequestError("starting_after: lies in the future of this response", param="starting_after")
        return self._stream(response, starting_after, has_obfuscation=query.include_obfuscation)

    async def cancel(self, request: Request, body: bytes) -> Response:
        """POST /v1/responses/{id}/cancel: harmless on one that is over. A body has no meaning here."""
        response = await self._owned(request)
        if not response.settings["background"]:
            raise BadRequestError("only a background response can be cancelled", param="id")
        self._replicas.check_own(self._registry, response)
        await self._end(response)
        return JSONResponse(await self._object(response))

    async def input_items(self, request: Request, body: bytes) -> Response:
        """GET /v1/responses/{id}/input_items: the conversation that it answers."""
        response = await self._owned(request)
        query = validate(ItemsQuery, dict(request.query_params))
        items = list(response.items) if query.order == "asc" else list(reversed(response.items))
        if query.after is not None:
            places = [i for i, item in enumerate(items) if item["id"] == query.after]
            if not places:
                raise NotFoundError("after: names none of the items", param="after")
            items = items[places[0] + 1 :]
        page = items[: query.limit]
        content = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(page) < len(items),
        }
        return JSONResponse(content, headers={"cache-control": "no-store"})

    def finish(
        self,
        id: str,
        generation: Generation,
        *,
        route: str = "/v1/responses",
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Keep a background response that is over, and tell of its end."""
        self._registry.finish(id)
        self._report([generation], route, context or {})

    async def _asked_items(self, request: Request, asked: ResponsesRequest, id: str) -> list[dict[str, Any]]:
        """The conversation that the response `id` shall answer. Raises: NotFoundError, BadRequestError."""
        items: list[dict[str, Any]] = []
        if asked.previous_response_id is not None:
            items += await self._conversation(await self._previous(request, asked.previous_response_id))
        kept: dict[str, dict[str, Any]] = {}  # items of responses that one was named of
        ids = {item["id"] for item in items}
        for i, item in enumerate(asked.own_items):
            if not isinstance(item, ItemReference):
                items.append(item.as_item(f"{id.removeprefix(ID_PREFIX)}_i{i}"))
                continue
            place = f"input[{i}].id"
            if item.id not in kept:
                kept |= await self._items_beside(request, item.id, place)
            if item.id not in kept:
                raise NotFoundError(f"{place}: names no item of a response that is kept", param=place)
            if item.id in ids:  # pages of items begin behind an id, and a short name is of a long text
                raise BadRequestError(f"{place}: this item is in the conversation already", param=place)
            ids.add(item.id)
            items.append(kept[item.id])
        return items

    async def _previous(self, request: Request, id: str) -> ModelResponse:
        name = "previous_response_id"
        await self._replicas.reach(self._registry, request, id, name)
        try:
            previous = self._registry.get_owned(id, request.state.tenant)
        except (NotFoundError, GoneError):
            raise PreviousResponseNotFoundError(f"{name}: no such response", param=name) from None
        if not previous.is_over:
            raise BadRequestError(f"{name}: this response is not over yet", param=name)
        return previous

    async def _conversation(self, response: ModelResponse) -> list[dict[str, Any]]:
        """What a response answers and its answer, as the next one has them."""
        return [*response.items, *map(as_input, (await self._object(response))["output"])]

    async def _items_beside(self, request: Request, item_id: str, param: str) -> dict[str, dict[str, Any]]:
        """By their ids all items of the response that has this one, which is named in `param`, where it is kept."""
        if (found := _ITEM_ID.fullmatch(item_id)) is not None:
            id = ID_PREFIX + found[1]
            await self._replicas.reach(self._registry, request, id, param)
            with suppress(NotFoundError, GoneError):
                response = self._registry.get_owned(id, request.state.tenant)
                return {item["id"]: item for item in await self._conversation(response)}
        return {}

    async def _start(
        self,
        request: Request,
        asked: ResponsesRequest,
        params: ResponseParams,
        id: str,
        make: Callable[[Generation], ModelResponse],
        num_bytes: int,
    ) -> ModelResponse:
        """Raises: ApiError."""
        if asked.store is False:
            [generation] = await self._answering.start(request, params, request.state.id, num_bytes)
            return make(generation)
        response = await start_stream(
            self._generator,
            self._registry,
            request,
            params,
            make,
            partial(self.finish, id, route=request.scope["path"], context=trace_context(request.headers))
            if asked.background
            else lambda _: self._registry.finish(id),
            is_journaled=bool(asked.background),
            num_bytes=num_bytes,
        )
        if not asked.background:
            self._answering.end_with(request, [response.generation])
        return response

    async def _owned(self, request: Request) -> ModelResponse:
        """The response that a path names. Raises: NotFoundError; OtherReplicaError; UnavailableError where it may yet
        come."""
        id = request.path_params["id"]
        await self._replicas.reach(self._registry, request, id, "id")
        try:
            return self._registry.get_owned(id, request.state.tenant)
        except (NotFoundError, GoneError):
            raise NotFoundError("no such response", param="id") from None

    async def _end(self, response: ModelResponse) -> None:
        """Raises: ShutdownError where it is the next process's to end."""
        await self._client.end(response.generation)
        if response.generation.is_interrupted:
            raise ShutdownError(is_resumable=True)

    def _events(self, response: ModelResponse) -> ResponseEvents:
        tokenizer = self._generator.tokenizer
        assert tokenizer is not None
        has_begun = response.generation.begins_in_reasoning
        parser = make_parser(tokenizer, response.params, begins_in_reasoning=has_begun)
        return ResponseEvents(response, parser, lambda items: chat_logprobs(tokenizer, items)["content"])

    async def _object(self, response: ModelResponse) -> dict[str, Any]:
        return (await self._made(response)).object()

    async def _made(self, response: ModelResponse) -> ResponseEvents:
        """What has been made of a response so far."""
        log, events, is_over = response.generation.log, self._events(response), response.is_over
        entries = log.entries(0, log.end)

        def make() -> ResponseEvents:
            for _ in chain(events.begin(), *map(events.push, entries), events.finish() if is_over else ()):
                pass
            return events

        return await make_off_loop(make, len(entries))

    def _stream(self, response: ModelResponse, starting_after: int, *, has_obfuscation: bool) -> Response:
        padding = self._settings.stream_padding_bytes or (OBFUSCATED_BYTES if has_obfuscation else 0)
        frames = self._frames(response, starting_after, padding)
        return EventStream(frames, _error_frame(InternalError(), 0))

    async def _frames(self, response: ModelResponse, starting_after: int, padding: int) -> AsyncIterator[bytes]:
        """What a reader is sent; each item is one write, and may hold several frames."""
        generation, log, events, cursor = response.generation, response.generation.log, self._events(response), 0

        def frames(found: Iterable[Event]) -> bytes:
            return b"".join(event.frame(padding) for event in found if event.number > starting_after)

        with log.subscribe(interval_s=self._settings.stream_interval_ms / 1000) as subscriber:
            if write := frames(events.begin()):
                yield write
            while True:
                piece = await subscriber.next(self._settings.heartbeat_s)
                if piece is None:
                    yield HEARTBEAT
                    continue
                end = piece.cursor - (piece.terminal is not None)
                while cursor < end:
                    entries = log.entries(cursor, min(cursor + _NUM_AT_ONCE, end))
                    cursor += len(entries)
                    if write := frames(chain.from_iterable(map(events.push, entries))):
                        if generation.stages.first_byte_s is None:
                            generation.stages.first_byte_s = self._client.clock()
                        yield write
                    if cursor < end:
                        await anyio.lowlevel.checkpoint()
                if piece.terminal is None:
                    continue
                if response.is_over:
                    if response.params.logprobs:  # each of the last events has all of them
                        for event in events.finish():
                            if write := frames([event]):
                                yield write
                            await anyio.lowlevel.checkpoint()
                        return
                    write = frames(events.finish())
                else:
                    # Under the number of the last event, behind which the next process goes on.
                    assert piece.terminal.error is not None
                    write = _error_frame(piece.terminal.error, events.num_events - 1)
                if write:
                    yield write
                return


def _error_frame(error: ApiError, number: int) -> bytes:
    fields = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return event_frame("error", fields | {"sequence_number": number}, id=None)
