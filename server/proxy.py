"""`headrace proxy`: a service before a slower model server, which merges single requests into that server's batches.

Lives on the event loop. A lane for each protocol, route and model forms the batches; a request that cannot share one
(see proxy_protocols.py) goes through the same lane alone, so that the queue and the number of upstream requests at once
are bounded for all of them. Requests are merged only where everything but their inputs is equal, the credentials that
are passed on included. What an upstream makes of a batch is its own: one that draws its samples of a whole batch from a
single generator answers a request with `temperature` above 0, with a `seed` or without, otherwise than it would alone.
"""

import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import anyio.abc
import httpx
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from pydantic_core import from_json, to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.dynamic_batcher import BatchPolicy
from headrace.scheduler.errors import HeadraceError
from headrace.server.admin import admin_app
from headrace.server.api_keys import ApiKeys, reload_keys
from headrace.server.batch_lane import Asker, BatchLane, Computed, LaneInput
from headrace.server.circuit_breaker import CircuitBreaker
from headrace.server.endpoint import Endpoint, ReceivedBytes, error_response, exception_handlers
from headrace.server.errors import (
    ApiError,
    BadGatewayError,
    BadRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UpstreamError,
)
from headrace.server.guard import guards
from headrace.server.metrics import RequestMetrics
from headrace.server.protocol import parse_json_object
from headrace.server.proxy_protocols import (
    WRONG_COUNT,
    Ask,
    Completions,
    CompletionSplitter,
    Embeddings,
    Instances,
    Items,
    MergedProtocol,
    Tensors,
    is_failed,
    sum_usage,
)
from headrace.server.proxy_settings import ProxySettings
from headrace.server.request_log import declared_route, log_unaccepted
from headrace.server.serve import DrainingServer, listen, say, start_logging, within_descriptors
from headrace.server.settings import is_loopback
from headrace.server.sse import EventStream, data_frame
from headrace.server.standing import standing_of
from headrace.server.tenant_limits import TenantLimits
from headrace.server.upstream import (
    BAD_ANSWER,
    TIMEOUT_HEADER,
    TOO_LARGE,
    UNREACHABLE,
    Answer,
    Call,
    Upstream,
    event_data,
    requested_timeout_s,
)
from headrace.server.version import VERSION

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 2.0
# How long what /ready has found out stands: probes of many machines must not be the upstream's load.
_READY_AGE_S = 1.0
_RETRY_S = 1.0
# What metrics call lanes whose names nobody but a client has said: names come from clients, and metrics stay.
_UNKNOWN_LANE = "other"
_DONE = b"data: [DONE]\n\n"
_BINARY_HEADER = "inference-header-content-length"
_CREDENTIALS = ("authorization", "x-api-key")
# Statuses of a batch that one of its items may be to blame for.
_ITEMS_STATUSES = frozenset({400, 413, 422, 500})
_READ_PATHS = (
    "/v1/models",
    "/v1/models/{model}",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/{model}",
    "/v2/models/{model}/ready",
)


class UpstreamKeyError(HeadraceError):
    """The file of the upstream's key cannot be read, or holds no key."""


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """What a lane batches: an item of a request, or with no `ask` the request as it came. `stream` takes the pieces of
    a streamed answer, and `place` is the item's place in its request."""

    call: Call
    protocol: MergedProtocol
    ask: Ask | None = None
    content: Any = None
    place: int = 0
    stream: MemoryObjectSendStream[Any] | None = None


@dataclass(slots=True, eq=False)
class _OpenLane:
    """A lane, its task, and how many requests are on their way to it or in it."""

    lane: BatchLane
    scope: anyio.CancelScope
    num_requests: int = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


class Proxy:
    """One proxy's parts. `asgi` is the application; the lifespan starts and stops the rest."""

    has_been_ready = True  # as its upstream may be from the beginning on

    def __init__(self, settings: ProxySettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Raises: ApiKeysError, UpstreamKeyError."""
        self.settings = settings
        self.keys = None if settings.api_keys_file is None else ApiKeys(Path(settings.api_keys_file))
        self.is_leaving = self.is_draining = False
        self.num_unfinished = 0
        self._num_bytes = 0  # of their bodies
        self.metrics = RequestMetrics()
        self.upstream = Upstream(
            settings.upstream,
            timeout_s=settings.timeout_s,
            retries=settings.retries,
            retry_budget=settings.retry_budget,
            breaker=CircuitBreaker(settings.breaker_failures, settings.breaker_reset_s),
            max_response_bytes=settings.max_response_bytes,
            max_connections=settings.max_connections,
            clock=time.monotonic,
            registry=self.metrics.registry,
            transport=transport,
        )
        self._upstream_key = None if settings.upstream_key_file is None else _read_key(settings.upstream_key_file)
        self._limits = TenantLimits(self.keys, time.monotonic)
        self._lanes: dict[tuple[str, ...], _OpenLane] = {}  # the one used longest ago first
        self._lane_names: set[str] = set()
        self._tasks: anyio.abc.TaskGroup
        self._reached = (-math.inf, False)  # when /ready asked, and what it found
        self.asgi = Starlette(
            routes=self._routes(),
            middleware=guards(settings, self.keys, self.report_refusal),
            exception_handlers=exception_handlers(self.report_refusal),
            lifespan=self._lifespan,
        )
        self.asgi.router.redirect_slashes = False
        self.admin = admin_app(settings, [*self._probes(), Route("/metrics", self._expose)], self.report_refusal)

    def reload_keys(self) -> None:
        """Read the key file again; where it is not as it should be, the old keys stay."""
        if reload_keys(self.keys) and self.keys is not None:
            self._limits.keep_only(self.keys.tenants)

    def report_refusal(self, id: str, path: str, received_s: float, status: int) -> None:
        """Count and log a request that was refused, wherever that was."""
        self.metrics.rejected.labels(str(status)).inc()
        log_unaccepted(id, declared_route(path, self.asgi.routes), received_s, f"refused: {status}")

    def leave(self) -> None:
        """Be ready no more."""
        self.is_leaving = True

    def stop_accepting(self) -> None:
        """Refuse requests from now on, and be ready no more."""
        self.is_draining = True

    def end_unfinished(self) -> None:
        """Give every request that is left its end."""
        for lane in self._lanes.values():
            lane.scope.cancel()

    @asynccontextmanager
    async def _lifespan(self, asgi: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as self._tasks:
            yield
            self._tasks.cancel_scope.cancel()
        await self.upstream.close()

    def _probes(self) -> list[Route]:
        return [Route("/health", self._health), Route("/ready", self._ready)]

    def _routes(self) -> list[Route]:
        settings = self.settings
        receiving = ReceivedBytes(settings.max_queue_bytes)

        def endpoint(respond: Callable[[Request, bytes], Awaitable[Response]], *media_types: str) -> Endpoint:
            return Endpoint(
                self._counted(respond),
                max_body_bytes=settings.max_body_bytes,
                media_types=("application/json", *media_types),
                receive_timeout_s=settings.receive_timeout_s,
                receiving=receiving,
                on_disconnect=lambda: self.metrics.count_cancelled("body"),
                on_rejected=self.report_refusal,
                refuse=error_response,
            )

        def merged(protocol: MergedProtocol, path: str | None = None, *media_types: str) -> Endpoint:
            async def respond(request: Request, body: bytes) -> Response:
                return await self._merge(protocol, request, body, path or _path(request))

            return endpoint(respond, *media_types)

        tensors = merged(Tensors(), None, "application/octet-stream", "")  # Triton's client names no type
        instances = merged(Instances())
        routes = [
            *self._probes(),
            *([Route("/metrics", self._expose)] if settings.admin_port is None else []),
            Route("/v1/embeddings", merged(Embeddings()), methods=["POST"]),
            Route("/v1/completions", merged(Completions()), methods=["POST"]),
            Route("/v2/models/{model}/infer", tensors, methods=["POST"]),
            Route("/v2/models/{model}/versions/{version}/infer", tensors, methods=["POST"]),
            Route("/v1/models/{model}:predict", instances, methods=["POST"]),
            Route("/v1/models/{model}/versions/{version}:predict", instances, methods=["POST"]),
            Route("/batch", merged(Items(), settings.generic_path), methods=["POST"]),
        ]
        return [*routes, *(Route(path, endpoint(self._read), methods=["GET"]) for path in _READ_PATHS)]

    def _counted(
        self, respond: Callable[[Request, bytes], Awaitable[Response]]
    ) -> Callable[[Request, bytes], Awaitable[Response]]:
        """`respond`, refused while draining, held to its tenant's limits, counted and logged."""

        async def counted(request: Request, body: bytes) -> Response:
            if self.is_draining:
                raise UnavailableError("the server is shutting down", "draining")
            if self._num_bytes + len(body) > self.settings.max_queue_bytes:
                raise OverloadedError(
                    "too much waits already", _RETRY_S, code="queue_full", tier=self._asker(request).tier
                )
            state = request.state
            state.stage = "queued"
            state.cleanup.enter_context(self._limits.within(state.tenant, 1))
            state.cleanup.callback(self._uncount, len(body))
            self.num_unfinished += 1
            self._num_bytes += len(body)
            response = await respond(request, body)
            state.is_accepted = True
            route = declared_route(request.scope["path"], self.asgi.routes)
            state.cleanup.callback(
                log_unaccepted, state.id, route, state.received_s, f"answered: {response.status_code}"
            )
            return response

        return counted

    def _uncount(self, num_bytes: int) -> None:
        self.num_unfinished -= 1
        self._num_bytes -= num_bytes

    async def _merge(self, protocol: MergedProtocol, request: Request, body: bytes, path: str) -> Response:
        headers, due_s = self._passed_headers(request), self._due_s(request)
        call = Call("POST", path, headers, due_s)
        is_binary = _BINARY_HEADER in request.headers
        fields = {} if is_binary else parse_json_object(body)
        ask = None if is_binary else protocol.read(fields)
        model = fields.get("model") if isinstance(fields.get("model"), str) else ""
        opened = self._lane(protocol, path, str(model)[:128])
        request.state.cleanup.enter_context(opened.in_use())
        lane = opened.lane
        asker = self._asker(request)
        if ask is None:
            is_streamed = isinstance(protocol, Completions) and bool(fields.get("stream"))
            inputs = [_Item(replace(call, body=body), protocol)]
            costs, group = [1.0], object()
        else:
            is_streamed = ask.is_streamed
            inputs = [_Item(call, protocol, ask, content, i) for i, content in enumerate(ask.items)]
            costs, group = list(ask.costs), (ask.group, tuple(sorted(headers.items())))
        if is_streamed:
            return await self._stream(request, lane, inputs, costs, group, asker)
        outcomes = await lane.submit(
            [LaneInput(item, cost, group) for item, cost in zip(inputs, costs, strict=True)],
            asker,
            due_s - time.monotonic(),
            is_all_or_nothing=not isinstance(protocol, Items),
        )
        return _response(protocol, ask, outcomes, request.state.id)

    async def _stream(
        self,
        request: Request,
        lane: BatchLane,
        items: Sequence[_Item],
        costs: Sequence[float],
        group: Any,
        asker: Asker,
    ) -> Response:
        send, receive = anyio.create_memory_object_stream[Any](math.inf)  # bounded by what is read of the upstream
        inputs = [LaneInput(replace(item, stream=send), cost, group) for item, cost in zip(items, costs, strict=True)]
        timeout_s = items[0].call.due_s - time.monotonic()
        scope = anyio.CancelScope()

        async def submit() -> None:
            with scope, send:
                try:
                    await lane.submit(inputs, asker, timeout_s)
                except ApiError as error:
                    # Its reader may have left at the same time, and this task is not the request's own.
                    with suppress(anyio.BrokenResourceError):
                        send.send_nowait(error)

        request.state.cleanup.callback(receive.close)
        request.state.cleanup.callback(scope.cancel)
        self._tasks.start_soon(submit)
        try:
            first = await receive.receive()
        except anyio.EndOfStream:
            raise BadGatewayError("the upstream's stream is empty", BAD_ANSWER) from None
        if isinstance(first, ApiError):
            raise first
        return EventStream(_frames(first, receive, request.state.id))

    async def _compute(self, items: Sequence[_Item]) -> Computed:
        began_s = time.monotonic()
        first = items[0]
        call = replace(first.call, due_s=max(item.call.due_s for item in items), is_shared=len(items) > 1)
        contents = [item.content for item in items]
        if first.ask is not None:
            call = replace(call, body=to_json(first.protocol.merge(first.ask.shared, contents)))
        outcomes: Sequence[Any]
        if first.stream is not None:
            outcomes = await self._relay(call, items)
        else:
            answer = await self.upstream.fetch(call)
            outcomes = [answer] if first.ask is None else first.protocol.split(contents, answer.json())
        return Computed(outcomes, time.monotonic() - began_s)

    async def _relay(self, call: Call, items: Sequence[_Item]) -> list[ApiError | None]:
        """Send a stream's pieces to whose they are. Raises: ApiError as long as nothing has been sent."""
        has_begun = False
        try:
            async with self.upstream.stream(call) as chunks:
                async for item, piece in _pieces(items, chunks):
                    has_begun = True
                    assert item.stream is not None
                    with suppress(anyio.BrokenResourceError):  # who has left while others stay
                        item.stream.send_nowait(piece)
        except ApiError as error:
            if not has_begun:
                raise
            return [error] * len(items)
        return [None] * len(items)

    async def _read(self, request: Request, body: bytes) -> Response:
        call = Call("GET", _path(request), self._passed_headers(request), self._due_s(request))
        answer = await self.upstream.fetch(call)
        return Response(answer.body, headers=answer.headers)

    def _passed_headers(self, request: Request) -> dict[str, str]:
        names = ["content-type", _BINARY_HEADER] if _BINARY_HEADER in request.headers else []
        if self.keys is None:  # else they are for this server
            names += _CREDENTIALS
        passed = {name: request.headers[name] for name in names if name in request.headers}
        for name, value in passed.items():
            if not value.isascii():
                raise BadRequestError(f"the header {name} holds more than ASCII", param=name)
        if self._upstream_key is not None:
            passed["authorization"] = f"Bearer {self._upstream_key}"
        return {"content-type": "application/json", **passed}

    def _due_s(self, request: Request) -> float:
        timeout_s = requested_timeout_s(request.headers.get(TIMEOUT_HEADER), self.settings.timeout_s)
        received_s: float = request.state.received_s
        return received_s + timeout_s

    def _asker(self, request: Request) -> Asker:
        tier, tenant, weight, _ = standing_of(self.keys, request.state.tenant)
        return Asker(tier, tenant, weight)

    def _lane(self, protocol: MergedProtocol, path: str, model: str) -> _OpenLane:
        """The lane of a model, opened if need be in place of one that has nothing to do. Raises: OverloadedError."""
        key = (protocol.name, path, model)
        found = self._lanes.pop(key, None)
        if found is None:
            if len(self._lanes) >= self.settings.max_models:
                self._close_idle_lane()
            found = _OpenLane(self._make_lane(f"{protocol.name}:{model or path}"), anyio.CancelScope())
            self._tasks.start_soon(_run, found)
        self._lanes[key] = found
        return found

    def _close_idle_lane(self) -> None:
        for key, idle in self._lanes.items():
            if idle.num_requests == 0 and idle.lane.num_unfinished == 0:
                idle.scope.cancel()
                del self._lanes[key]
                return
        raise OverloadedError("too many models are in use", _RETRY_S, code="too_many_models", tier="standard")

    def _make_lane(self, name: str) -> BatchLane:
        settings = self.settings
        policy = BatchPolicy(
            max_size=settings.max_batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            max_cost=settings.max_batch_cost or math.inf,
            max_padding=1.0,  # whether the upstream pads is its own affair, and max_batch_cost bounds it
        )

        async def compute(items: Sequence[_Item]) -> Computed:
            computed = await self._compute(items)
            if lane.name != name and len(self._lane_names) < settings.max_models:  # the upstream knows it
                self._lane_names.add(name)
                lane.rename(name)
            return computed

        lane = BatchLane(
            name if name in self._lane_names else _UNKNOWN_LANE,
            policy,
            compute,
            tier_weights=SchedulingPolicy().tier_weights,
            max_queue_size=settings.max_queue_size,
            metrics=self.metrics,
            clock=time.monotonic,
            num_at_once=settings.max_concurrent_batches,
            is_divisible=_may_be_one_items,
        )
        return lane

    async def _health(self, request: Request) -> Response:
        """Alive: the loop answers."""
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """Ready: the upstream answers and is not left alone for failing, and the proxy is not draining."""
        if self.is_leaving or self.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        now = time.monotonic()
        if self.upstream.breaker.retry_in_s(now) > 0:
            return JSONResponse({"status": "upstream_down"}, 503)
        asked_s, is_reachable = self._reached
        if now - asked_s > _READY_AGE_S:
            is_reachable = await self.upstream.is_reachable(self.settings.health_path, _READY_TIMEOUT_S)
            self._reached = (now, is_reachable)
        return JSONResponse({"status": "ready" if is_reachable else "upstream_down"}, 200 if is_reachable else 503)

    async def _expose(self, request: Request) -> Response:
        return Response(self.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")


def serve_proxy(settings: ProxySettings) -> int:
    """Serve until a signal ends it; returns the process's exit code."""
    start_logging(settings)
    # httpx tells of every request, with its URL.
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        listeners = listen(settings)
        settings = within_descriptors(settings, descriptors_each=2)  # its client's, and one to the upstream
        proxy = Proxy(settings)
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    if proxy.keys is None and not is_loopback(settings.host):
        say("anyone who reaches this address may use it: there are no keys (see api_keys_file)")
    server = DrainingServer(proxy, settings, listeners)
    say(f"version {VERSION}, proxy of {settings.upstream}, listening on {server.url}")
    server.run(listeners)
    return 0


async def _run(open_lane: _OpenLane) -> None:
    with open_lane.scope:
        await open_lane.lane.run()


async def _pieces(items: Sequence[_Item], chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[_Item, Any]]:
    """(Whose it is, the piece): bytes of a stream that is passed through, chunks of one that is split."""
    if items[0].ask is None:
        async for chunk in chunks:
            yield items[0], chunk
        return
    splitter = CompletionSplitter([item.content for item in items])
    async with aclosing(event_data(chunks)) as events:
        async for data in events:
            if data == b"[DONE]":
                return
            try:
                chunk = from_json(data, allow_inf_nan=False)
            except ValueError:
                raise BadGatewayError("the upstream's stream is not JSON", BAD_ANSWER) from None
            if isinstance(chunk, dict) and "error" in chunk:
                raise UpstreamError(500, chunk, {})
            for index, part in splitter.split(chunk):
                item = items[index]
                yield item, {**part, "choices": [{**choice, "index": item.place} for choice in part["choices"]]}
    raise BadGatewayError("the upstream's stream was cut off", UNREACHABLE)


async def _frames(first: Any, receive: MemoryObjectReceiveStream[Any], id: str) -> AsyncIterator[bytes]:
    """A client's stream, made of the pieces of all its items; their counts of tokens come once, at the end."""
    counted: list[dict[str, Any]] = []
    is_raw = isinstance(first, bytes)
    piece = first
    while True:
        if isinstance(piece, ApiError):
            # What was passed through may have been cut off anywhere.
            yield (b"\n\n" if is_raw else b"") + data_frame(piece.envelope())
            return
        if is_raw:
            yield piece
        elif piece["choices"]:
            yield data_frame({**piece, "id": f"cmpl-{id}"})
        else:
            counted.append(piece)
        try:
            piece = await receive.receive()
        except anyio.EndOfStream:
            break
    if is_raw:
        return
    if counted:
        yield data_frame({**counted[0], "id": f"cmpl-{id}", "usage": sum_usage([part["usage"] for part in counted])})
    yield _DONE


def _response(protocol: MergedProtocol, ask: Ask | None, outcomes: Sequence[Any], id: str) -> Response:
    if ask is None:
        [answer] = outcomes
        if isinstance(answer, ApiError):
            raise answer
        assert isinstance(answer, Answer)
        return Response(answer.body, headers=answer.headers)
    failures = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
    # What failed of something else than its items has no results to tell.
    if len(failures) == len(outcomes) and (ask.own.get("is_single") or not any(map(_may_be_one_items, failures))):
        raise failures[0]
    content = protocol.join(ask, outcomes, id)
    status = 422 if is_failed(content) else 200
    return Response(to_json(content, inf_nan_mode="constants"), status, media_type="application/json")


def _may_be_one_items(error: ApiError) -> bool:
    """Whether a batch may have failed of one of its items, so that the others are worth asking again."""
    if isinstance(error, UpstreamError):
        return error.status in _ITEMS_STATUSES
    return isinstance(error, BadGatewayError) and error.code in (WRONG_COUNT, TOO_LARGE)


def _path(request: Request) -> str:
    """The upstream's path for a request's. Raises: NotFoundError for one that would lead elsewhere."""
    path: str = request.scope["path"]
    if {".", ".."} & set(path.replace(":", "/").split("/")):
        raise NotFoundError(f"{path[:200]} is not a model's")
    return quote(path, safe="/:@")


def _read_key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UpstreamKeyError(f"upstream_key_file: {path} cannot be read: {error}") from None
    if not key or not key.isprintable() or not key.isascii():
        raise UpstreamKeyError(f"upstream_key_file: {path} holds no key")
    return key
