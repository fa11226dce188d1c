"""What every generation route shares: the body, the disconnect, and errors as responses.

An endpoint is an ASGI app around a coroutine `(request) -> response`. One watcher listens for the disconnect from the
last byte of the body to the last byte of the response, and cancels all that the request started: only `receive()`
tells of it, since `send()` to a closed connection returns in silence (ASGI 2.3). While the body is being read there is
nothing to watch for: the disconnect arrives in its place.
"""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from headrace.server.error_forms import error_form, is_anthropic
from headrace.server.errors import (
    ApiError,
    BadRequestError,
    BodyTooLargeError,
    InternalError,
    MethodNotAllowedError,
    ReceiveTimeoutError,
    RoutingError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from headrace.server.gateway import Gateway
from headrace.server.idempotency import HEADER, REPLAYED_HEADER, Idempotency, Recording
from headrace.server.request_log import OnRejected, declared_route, log_unaccepted
from headrace.server.sse import EventStream, retry_frame
from headrace.server.standing import NO_HINTS

logger = logging.getLogger(__name__)

# Makes the response of an error, for a path and a request's id.
Refuse = Callable[[ApiError, str, str], Response]
_REQUEST_ID = re.compile(r"[\w.:~+/=@-]{1,128}", re.ASCII)


class ReceivedBytes:
    """What all of a server's bodies that are still being received come to: `max_bytes` at most, unless it is one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def add(self, num_bytes: int, num_before: int) -> None:
        """Count more of a body, of which `num_before` are counted. Raises: UnavailableError, with nothing added."""
        if self._num_bytes > num_before and self._num_bytes + num_bytes > self._max_bytes:
            raise UnavailableError("too many bodies are being received", "overloaded")
        self._num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


class Endpoint:
    """`respond` gets the request and its body (empty for GET and DELETE) and returns the response.

    `request.state` holds `id`, which goes out as x-request-id, `received_s`, `is_accepted`, which `respond` sets once
    the request is logged elsewhere, `has_failed`, which it sets where the answer ended otherwise than it should,
    `stage`, which a client's departure is logged with, `hints`, what the `gateway` says of the request, and `cleanup`,
    an ExitStack that is unwound after the response, or in its place. `on_disconnect` is told of a client that left
    while its body was read, `on_rejected` of every refusal; `refuse` makes the response of one. `media_types` None
    takes bodies of any type; `takes_head` leaves it to `respond` what HEAD may ask for.
    """

    def __init__(
        self,
        respond: Callable[[Request, bytes], Awaitable[Response]],
        *,
        max_body_bytes: int,
        receive_timeout_s: float,
        receiving: ReceivedBytes,
        on_disconnect: Callable[[], None],
        on_rejected: OnRejected,
        refuse: Refuse,
        media_types: tuple[str, ...] | None = ("application/json",),
        takes_head: bool = False,
        idempotency: Idempotency | None = None,
        gateway: Gateway | None = None,
    ) -> None:
        self._respond = respond
        self._max_body_bytes = max_body_bytes
        self._receive_timeout_s = receive_timeout_s
        self._receiving = receiving
        self._on_disconnect = on_disconnect
        self._on_rejected = on_rejected
        self._refuse = refuse
        self._media_types = media_types
        self._takes_head = takes_head
        self._idempotency = idempotency
        self._gateway = gateway

    @property
    def is_repeatable(self) -> bool:
        """Whether an answer is made once for all who ask with the same key."""
        return self._idempotency is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request.state.id = request_id(request.headers)
        request.state.received_s = time.monotonic()
        request.state.is_accepted = request.state.has_failed = False
        request.state.stage = "tokenizing"
        claim: tuple[Recording, bool] | None = None
        try:
            # Starlette adds it to every GET route, and it must not start anything.
            if request.method == "HEAD" and not self._takes_head:
                raise MethodNotAllowedError("HEAD is not allowed here", headers={"allow": "GET"})
            request.state.hints = NO_HINTS if self._gateway is None else self._gateway.hints(request)
            body = await self._read_body(request) if request.method == "POST" else b""
            if self._idempotency is not None and (key := request.headers.get(HEADER)) is not None:
                claim = await self._idempotency.claim(scope["path"], request.state.tenant, key, body)
        except ClientDisconnect:
            self._on_disconnect()
            self._log_departure(request, "body")
            return
        except ApiError as error:
            # The rest of the body is not read, so the connection cannot carry another request.
            response = self._refusal(request, error)
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if claim is not None:
            await self._share(*claim, request, body, receive, send)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_on_disconnect, receive, tasks.cancel_scope)
            await self._respond_to(request, body, partial(self._headers, request), scope, receive, send)
            tasks.cancel_scope.cancel()

    def _headers(self, request: Request) -> dict[str, str]:
        """What any answer has, and the load where that is asked for."""
        load = {} if self._gateway is None else self._gateway.load_header(request)
        return id_headers(request.scope["path"], request.state.id) | load

    async def _respond_to(
        self,
        request: Request,
        body: bytes,
        headers: Callable[[], dict[str, str]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        # What `respond` starts it registers here, so that it ends with the response however that ends.
        with contextlib.ExitStack() as cleanup:
            request.state.cleanup = cleanup
            response = await self._answer(request, body)
            response.headers.update(headers())
            await response(scope, receive, send)

    async def _share(
        self, recording: Recording, is_first: bool, request: Request, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Read a recording, which the first to ask makes too, until nobody is left to read it."""
        assert self._idempotency is not None

        def headers() -> dict[str, str]:
            return self._headers(request) | ({} if is_first else {REPLAYED_HEADER: "true"})

        scope = {**request.scope, "extensions": {}}  # without a way past `send`
        try:
            async with anyio.create_task_group() as making:
                if is_first:
                    # What is each reader's own is not recorded.
                    making.start_soon(recording.make, partial(self._respond_to, request, body, dict, scope, receive))
                async with anyio.create_task_group() as reading:
                    reading.start_soon(_cancel_on_disconnect, receive, reading.cancel_scope)
                    await recording.read(send, headers)
                    reading.cancel_scope.cancel()
        finally:
            if is_first:
                self._idempotency.settle(recording, has_failed=request.state.has_failed)
            else:
                log_unaccepted(request.state.id, self._route(request), request.state.received_s, "replayed")

    async def _answer(self, request: Request, body: bytes) -> Response:
        try:
            return await self._respond(request, body)
        except ApiError as error:
            return self._refusal(request, error)
        except anyio.get_cancelled_exc_class():
            if not request.state.is_accepted:
                self._log_departure(request, request.state.stage)
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, self._route(request))
            return error_response(InternalError(), request.scope["path"], request.state.id)

    def _refusal(self, request: Request, error: ApiError) -> Response:
        """What tells a client of `error`, which is noted."""
        state, path = request.state, request.scope["path"]
        if not state.is_accepted:  # else its generation has an end and a line of its own
            self._on_rejected(state.id, path, state.received_s, error.status)
        return self._refuse(error, path, state.id)

    def _log_departure(self, request: Request, stage: str) -> None:
        log_unaccepted(request.state.id, self._route(request), request.state.received_s, f"cancelled: {stage}")

    def _route(self, request: Request) -> str:
        return declared_route(request.scope["path"], request.app.routes)

    async def _read_body(self, request: Request) -> bytes:
        """Raises: ClientDisconnect; ApiError for what can be told from the headers, a body over the limit, or one that
        all others leave no room for."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page on another origin can send some other types without asking first, so this also stops drive-by requests.
        if self._media_types is not None and media_type not in self._media_types:
            raise UnsupportedMediaTypeError(f"content-type must be {' or '.join(self._media_types)}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaTypeError("compressed bodies are not accepted")
        too_large = BodyTooLargeError(f"the body is larger than {self._max_body_bytes} bytes")
        length = request.headers.get("content-length")
        if length is not None:
            if not (length.isascii() and length.isdigit()):
                raise BadRequestError("content-length is not a number")
            # Python refuses to parse numbers of thousands of digits.
            if len(length) > 20 or int(length) > self._max_body_bytes:
                raise too_large
        body = bytearray()
        try:
            with anyio.move_on_after(self._receive_timeout_s):
                async for chunk in request.stream():
                    self._receiving.add(len(chunk), len(body))
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise too_large
                return bytes(body)
        finally:
            self._receiving.remove(len(body))
        raise ReceiveTimeoutError(f"the body did not arrive within {self._receive_timeout_s:g} s")


def request_id(headers: Mapping[str, str]) -> str:
    """What a request is called: as its client calls it in X-Request-ID, where that is a word, else 128 random bits."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def error_response(error: ApiError, path: str, id: str) -> Response:
    """A refusal in the form of the API that `path` belongs to."""
    headers = {**error.headers, **id_headers(path, id)}
    return JSONResponse(error_form(error, path, id), error.status, headers)


def id_headers(path: str, id: str) -> dict[str, str]:
    """What tells a client the id of its request."""
    return {"x-request-id": id} | ({"request-id": id} if is_anthropic(path) else {})


def refuse_event_source(error: ApiError, path: str, id: str) -> Response:
    """A refusal of what an EventSource asks for. Any status but 200 would end it for good: where coming back later
    helps, an empty stream makes it do so."""
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None:
        return error_response(error, path, id)

    async def frames() -> AsyncIterator[bytes]:
        yield retry_frame(round(retry_after_s * 1000))

    response = EventStream(frames())
    response.headers.update(id_headers(path, id))
    return response


def exception_handlers(on_rejected: OnRejected) -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """What answers where no endpoint does: the router's refusals (no such route, wrong method), and what goes wrong
    outside of one."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        id, path = request_id(request.headers), request.scope["path"]
        on_rejected(id, path, time.monotonic(), error.status_code)
        message = f"{request.method} {path[:200]}: {error.detail}"
        return error_response(RoutingError(message, error.status_code, dict(error.headers or {})), path, id)

    async def fail(request: Request, error: Exception) -> Response:
        return error_response(InternalError(), request.scope["path"], secrets.token_hex(16))

    return {HTTPException: refuse, Exception: fail}
