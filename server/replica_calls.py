"""A request as a call to a replica: the side that takes it from a client, and the side that answers it.

Each lives on the event loop of its own process, and neither knows how a call travels: what comes back is the head of
the response, then pieces of its body. The client's departure closes the call, and there the app hears of it as of a
disconnect. A stream whose replica is lost half-way is ended by the first side, in the form of its route. What one side
sends before the other takes it waits in memory, which an answer's length bounds.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.endpoint import (
    Endpoint,
    ReceivedBytes,
    error_response,
    exception_handlers,
    refuse_event_source,
)
from headrace.server.error_forms import error_form, is_anthropic, is_ollama
from headrace.server.errors import ApiError, UnavailableError
from headrace.server.idempotency import HEADER as IDEMPOTENCY_HEADER
from headrace.server.replica_routing import Destination, prompt_key
from headrace.server.request_log import log_unaccepted
from headrace.server.settings import Settings
from headrace.server.sse import data_frame, event_frame, line_frame

# By which a response tells who has made it, and a request asks for one replica: for its metrics, say.
REPLICA_HEADER = "x-headrace-replica"
# What of a scope travels; the rest are this process's own objects.
_SCOPE_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
_ROUTE = "/{path:path}"
_EVENT_SOURCES = re.compile(r"/v1/stream|/v1/streams/[^/]+/events")
# An id, or a ticket, that says which replica has made it.
_OWNED = re.compile(rb"([a-z0-9-]{1,32})(?:-[0-9a-f]{32}|\.[\w-]{43})(?![\w-])")
_PREVIOUS = re.compile(rb'"previous_response_id"\s*:\s*"([^"\\]{1,128})"')


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """A request with its whole body, and what says where it should go."""

    scope: dict[str, Any]
    body: bytes
    destination: Destination


Head = tuple[int, list[tuple[bytes, bytes]]]
"""A response's status and headers."""

Results = AsyncGenerator[Head | bytes, None]
"""A head, then pieces of the body. Raises: ApiError where the replica is lost."""


def ingress_app(settings: Settings, call: Callable[[ReplicaRequest], Results]) -> Starlette:
    """The application before the replicas: every request is read within the limits of the settings, and called."""

    def report_refusal(id: str, path: str, received_s: float, status: int) -> None:
        log_unaccepted(id, _ROUTE, received_s, f"refused: {status}")

    def refuse(error: ApiError, path: str, id: str) -> Response:
        is_event_source = _EVENT_SOURCES.fullmatch(path) is not None
        return (refuse_event_source if is_event_source else error_response)(error, path, id)

    async def respond(request: Request, body: bytes) -> Response:
        results = call(_replica_request(request, body))
        try:
            head = await anext(results)
        except BaseException:
            await results.aclose()
            raise
        assert isinstance(head, tuple)
        return _ReplicaResponse(head, results, settings.has_journal)

    endpoint = Endpoint(
        respond,
        max_body_bytes=max(settings.max_body_bytes, settings.max_image_bytes),
        media_types=None,
        takes_head=True,
        receive_timeout_s=settings.receive_timeout_s,
        receiving=ReceivedBytes(settings.max_queue_bytes),
        on_disconnect=lambda: None,
        on_rejected=report_refusal,
        refuse=refuse,
    )
    return Starlette(routes=[Route(_ROUTE, endpoint)], exception_handlers=exception_handlers(report_refusal))


def _replica_request(request: Request, body: bytes) -> ReplicaRequest:
    scope, headers = request.scope, request.headers
    # Both logs call it by one id.
    named = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    named.append((b"x-request-id", request.state.id.encode()))
    copied = {key: scope[key] for key in _SCOPE_KEYS if key in scope}
    for key in ("client", "server"):
        copied[key] = None if scope.get(key) is None else tuple(scope[key])
    return ReplicaRequest({**copied, "headers": named}, body, destination(scope, headers, body))


def destination(scope: Scope, headers: Headers, body: bytes) -> Destination:
    """What is known of where a request should go."""
    names = [scope["path"].encode(), scope["query_string"], headers.get("last-event-id", "").encode("latin-1")]
    names += _PREVIOUS.findall(body)
    owners = [owner.decode() for name in names for owner in _OWNED.findall(name)]
    if (wanted := headers.get(REPLICA_HEADER)) is not None:
        owners.insert(0, wanted)
    key = prompt_key(scope["path"], scope["query_string"], body)
    return Destination(key, tuple(owners), headers.get(IDEMPOTENCY_HEADER))


class _ReplicaResponse(Response):
    """A replica's response, as it comes."""

    def __init__(self, head: Head, results: Results, has_journal: bool) -> None:
        self.status_code, self.raw_headers = head
        self._has_journal = has_journal
        self.background = None
        self._results = results

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._results):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for piece in self._results:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except ApiError as error:
                media_type = self.headers.get("content-type", "").partition(";")[0]
                if media_type not in ("text/event-stream", "application/x-ndjson"):
                    raise  # nothing but a cut tells that it is not whole
                is_resumable = self._has_journal and _EVENT_SOURCES.fullmatch(scope["path"]) is not None
                frame = failure_frame(error, scope["path"], self.headers.get("x-request-id", ""), is_resumable)
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def failure_frame(error: ApiError, path: str, id: str, is_resumable: bool) -> bytes:
    """What ends a stream in the form of its route, in place of the end that did not come; one that another replica goes
    on with is only interrupted."""
    form = error_form(error, path, id)
    if is_resumable:
        return event_frame("interrupted", {**form["error"], "resumable": True}, id=None)
    if is_ollama(path):
        return line_frame(form)
    if path.startswith("/v1/responses"):
        form = {**form["error"], "type": "error", "sequence_number": 0}
    is_named = is_anthropic(path) or path.startswith(("/v1/stream", "/v1/responses"))
    return event_frame("error", form, id=None) if is_named else data_frame(form)


def replica_lost() -> ApiError:
    """What a client is told whose request was with a replica that has ended."""
    return UnavailableError("the replica that had this request has ended", "replica_lost")


async def answer(
    asgi: ASGIApp, name: str, request: ReplicaRequest, pause_s: Callable[[], float] = lambda: 0.0
) -> Results:
    """Have the app of the replica of this name answer a call, in a task of its own.

    Between two pieces of a body are at least `pause_s`, and what the app sends meanwhile comes as one. Closed or
    cancelled, it tells the app that the client has left, and waits until the app is through.
    """
    sent: list[Message] = []
    has_news, has_left = asyncio.Event(), asyncio.Event()
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await has_left.wait()
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)
        has_news.set()

    app = asyncio.ensure_future(asgi({**request.scope, "extensions": {}, "state": {}}, receive, send))
    app.add_done_callback(lambda _: has_news.set())
    try:
        is_over, is_first = False, True
        while not is_over:
            await has_news.wait()
            if not is_first and (pause := pause_s()) > 0:
                await asyncio.wait([app], timeout=pause)
            has_news.clear()
            is_over = app.done()
            messages, sent = sent, []
            if messages and messages[0]["type"] == "http.response.start":
                yield messages[0]["status"], [*messages[0]["headers"], (REPLICA_HEADER.encode(), name.encode())]
            if body := b"".join(message.get("body", b"") for message in messages):
                yield body
                is_first = False
        app.result()
    finally:
        has_left.set()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([app])
