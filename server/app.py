"""The ASGI application: routes, middleware, and what starts and stops with the server.

Made on the main thread, run on the event loop. It wires the parts together and knows none of their insides.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from headrace.scheduler.engine_core import Runner
from headrace.scheduler.errors import HeadraceError, ModelSourceError
from headrace.scheduler.messages import Tier
from headrace.scheduler.one_shot_runner import OneShotModel
from headrace.scheduler.scheduler import Scheduler
from headrace.server.admin import admin_app
from headrace.server.admin_api import AdminApi
from headrace.server.answering import Answering
from headrace.server.api_keys import ApiKeys, reload_keys
from headrace.server.endpoint import (
    Endpoint,
    ReceivedBytes,
    Refuse,
    error_response,
    exception_handlers,
    refuse_event_source,
)
from headrace.server.engine_client import EngineClient, QueueLimits
from headrace.server.errors import ApiError, EngineFailedError, ShutdownError
from headrace.server.gateway import Gateway
from headrace.server.generation import Generation
from headrace.server.generator import Generator
from headrace.server.grammars import Grammars
from headrace.server.guard import guards
from headrace.server.idempotency import Idempotency
from headrace.server.journal import Journal
from headrace.server.journal_folder import JournalFolder
from headrace.server.messages_api import MessagesApi
from headrace.server.model_details import ModelDetails
from headrace.server.model_response import ID_PREFIX, ModelResponse
from headrace.server.native_api import NativeApi
from headrace.server.ollama_api import OllamaApi
from headrace.server.one_shot_api import OneShotApi
from headrace.server.one_shot_models import OneShots, OneShotSource
from headrace.server.openai_api import OpenAIApi
from headrace.server.openapi import OpenApi
from headrace.server.replicas import Replicas
from headrace.server.request_log import declared_route, log_request, log_unaccepted
from headrace.server.responses_api import ResponsesApi
from headrace.server.restore import Shelf, restore_streams
from headrace.server.router_api import RouterApi
from headrace.server.settings import Settings
from headrace.server.shared_journals import SharedJournals, open_own_journal
from headrace.server.stream_registry import NativeStream, StreamRegistry
from headrace.server.tenant_limits import TenantLimits
from headrace.server.tickets import Tickets
from headrace.server.tokenizer import Tokenizer
from headrace.server.tokens_api import TokensApi
from headrace.server.tracing import Tracing
from headrace.server.version import VERSION
from headrace.server.watchdog import Watchdog

logger = logging.getLogger(__name__)

_SWEEP_INTERVAL_S = 0.25
_LAG_INTERVAL_S = 0.1
# A step takes well under a second.
_STOP_TIMEOUT_S = 5.0
_STATIC = Path(__file__).parent / "static"
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class App:
    """One server's parts. `asgi` is the application; the lifespan starts and stops the rest.

    `load_engine` and `load_one_shots` run on the engine thread, `load_tokenizer` and `read_details` on a worker.
    `on_engine_change` is called on the loop: with None once requests can be served, with the error if that cannot be or
    is over.
    """

    def __init__(
        self,
        settings: Settings,
        model_name: str,
        load_engine: Callable[[], tuple[Scheduler, Runner]],
        load_tokenizer: Callable[[], Tokenizer],
        on_engine_change: Callable[[Exception | None], None] = lambda error: None,
        tracing: Tracing | None = None,
        one_shots: Sequence[OneShotSource] = (),
        load_one_shots: Callable[[], Mapping[str, OneShotModel]] = dict,
        model_fingerprint: str = "",
        read_details: Callable[[], ModelDetails] = ModelDetails,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """`adapters` are those of the model, with their fingerprints. Raises: ApiKeysError, JournalError."""
        self.settings = settings
        self.keys = None if settings.api_keys_file is None else ApiKeys(Path(settings.api_keys_file))
        self.journal: Journal | None = None
        folder: JournalFolder | None = None
        model, fsync = f"{model_name} {model_fingerprint}", settings.journal_fsync
        if settings.journal_file is not None:
            self.journal = Journal(Path(settings.journal_file), fsync, model)
        elif settings.journal_dir is not None:
            folder = JournalFolder(Path(settings.journal_dir), settings.replica_name)
            self.journal = open_own_journal(folder, fsync, model)
        targets_s = settings.ttft_targets_s
        self.client = EngineClient(
            load_engine,
            model_name=model_name,
            limits=QueueLimits(settings.max_queue_size, settings.max_queue_tokens, settings.max_queue_bytes),
            tier_weights=dict(zip(Tier, settings.tier_weights, strict=True)),
            ttft_targets_s=None if targets_s == "auto" else dict(zip(Tier, targets_s, strict=True)),
            load_one_shots=load_one_shots,
            journal=self.journal,
        )
        self.is_leaving = False
        self.metrics = self.client.metrics
        self.metrics.describe(settings.block_size, tuple(adapters or ()))
        self._gateway = Gateway(settings, self.metrics.load_report)
        # With keys and without an address for the operator alone every tenant may read the metrics.
        self.metrics.names_tenants = self.keys is not None and settings.admin_port is not None
        if (journal := self.journal) is not None:
            self.metrics.watch("journal_active", "1 while streams are recorded", lambda: journal.is_active)
        self.metrics.watch("event_loop_tasks", "Tasks on the event loop", lambda: len(asyncio.all_tasks()))
        self.watchdog = Watchdog(
            lambda: self.client.engine_busy_since_s,
            lambda: min(
                (since_s for each in self.client.journals if (since_s := each.busy_since_s) is not None), default=None
            ),
            self._give_up,
            soft_s=settings.watchdog_soft_s,
            hard_s=settings.watchdog_hard_s,
            metrics=self.metrics,
        )
        self.registry: StreamRegistry[NativeStream] = StreamRegistry(
            cancel=self.client.cancel,
            grace_s=settings.stream_grace_s,
            ttl_s=settings.stream_ttl_s,
            max_finished_bytes=settings.stream_log_bytes,
            on_forget=self._erase,
            is_whole=self.journal is None,
        )
        self.responses: StreamRegistry[ModelResponse] = StreamRegistry(
            cancel=self.client.cancel,
            grace_s=0,  # none of them is cancelled for want of a reader
            ttl_s=settings.response_ttl_s,
            max_finished_bytes=settings.response_store_bytes,
            on_forget=self._erase,
            is_whole=self.journal is None,
        )
        self.tickets = Tickets(self.client.clock, settings.replica_name)
        self.idempotency = Idempotency(
            self.client.clock, ttl_s=settings.idempotency_ttl_s, max_bytes=settings.idempotency_bytes
        )
        limiter = anyio.CapacityLimiter(settings.tokenizer_threads)
        self.limits = TenantLimits(self.keys, self.client.clock)
        self.grammars = Grammars(settings.grammar_cache_bytes)
        self.generator = Generator(
            self.client, settings, model_name, limiter, self.keys, self.limits, self.grammars, adapters or {}
        )
        self.one_shots = OneShots(one_shots, self.client, settings, self.keys)
        self._answering = Answering(self.generator, self._report)
        self._ollama = OllamaApi(self._answering)
        self._router_api = RouterApi(self.generator)
        self._admin_api = AdminApi(self.client, self.one_shots.models, self.watchdog)
        self._receiving = ReceivedBytes(settings.max_queue_bytes)
        self._shelves = [
            Shelf(ID_PREFIX, ModelResponse, self.responses, lambda id, ended: self._responses.finish(id, ended)),
            Shelf("", NativeStream, self.registry, lambda id, ended: self._native.finish(id, ended)),
        ]
        self._shared: SharedJournals | None = None
        if folder is not None:
            self._shared = SharedJournals(folder, fsync, model, self.generator, self._shelves)
        replicas = Replicas(settings, self._shared)
        self._native = NativeApi(self.generator, self.registry, self.tickets, replicas, self._report)
        self._responses = ResponsesApi(self._answering, self.responses, replicas, self._report)
        self.settled = anyio.Event()  # requests can be served, or never will be
        self._load_tokenizer = load_tokenizer
        self._read_details = read_details
        self._on_engine_change = on_engine_change
        self._tracing = tracing
        self.asgi = Starlette(
            routes=self._routes(),
            middleware=guards(settings, self.keys, self.report_refusal),
            exception_handlers=exception_handlers(self.report_refusal),
            lifespan=self._lifespan,
        )
        self.asgi.router.redirect_slashes = False  # to a URL made of the Host header, which may be none
        self.admin = admin_app(
            settings,
            [*self._probes(), *self._operators_routes(), *self._admin_routes(), _STATIC_ROUTE],
            self.report_refusal,
        )

    @property
    def is_ready(self) -> bool:
        client = self.client
        has_engine = client.ready is not None and not client.stopped.is_set()
        has_inputs = self.generator.tokenizer is not None and self.one_shots.is_ready
        can_go_on = not (self.is_leaving or client.is_draining) and self.watchdog.hung is None
        return has_engine and has_inputs and self.settled.is_set() and can_go_on

    @property
    def has_been_ready(self) -> bool:
        """Whether anybody may have been told that it is."""
        return self.settled.is_set()

    @property
    def num_unfinished(self) -> int:
        """Requests that the server has yet to answer."""
        return self.client.num_unfinished + self.one_shots.num_unfinished

    def reload_keys(self) -> None:
        """Read the key file again; where it is not as it should be, the old keys stay."""
        if reload_keys(self.keys) and self.keys is not None:
            self.tickets.keep_only(self.keys.tenants)
            self.limits.keep_only(self.keys.tenants)

    def leave(self) -> None:
        """Be ready no more."""
        self.is_leaving = True

    def stop_accepting(self) -> None:
        """Refuse requests from now on, and be ready no more."""
        self.client.is_draining = True

    def end_unfinished(self) -> None:
        """Give every request that is left its end."""
        self._interrupt_all()
        self._fail_items(ShutdownError(is_resumable=False))

    def _give_up(self) -> None:
        self.stop_accepting()
        error = EngineFailedError(f"the {self.watchdog.hung} hangs")
        if self.watchdog.hung == "journal":  # which could not say that they are over, and the next process goes on
            self._interrupt_all()
        else:
            self.client.cancel_all(error)
        self._fail_items(error)

    def _interrupt_all(self) -> None:
        self.client.interrupt_all()
        if self._shared is not None:
            self._shared.interrupt()

    def _erase(self, id: str) -> None:
        for journal in self.client.journals:
            journal.erase(id)

    def _fail_items(self, error: ApiError) -> None:
        for model in self.one_shots.models:
            model.lane.fail_all(error)

    @asynccontextmanager
    async def _lifespan(self, asgi: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            self.client.start()
            tasks.start_soon(self._watch_engine)
            tasks.start_soon(self._sweep)
            tasks.start_soon(self._measure_lag)
            tasks.start_soon(self.watchdog.run)
            if self._shared is not None:
                tasks.start_soon(self._shared.run)
            for model in self.one_shots.models:
                tasks.start_soon(model.lane.run)
            yield
            self.stop_accepting()
            self._interrupt_all()
            # Loading may take minutes, and nobody waits for it.
            await self.client.stop(0 if self.client.ready is None else _STOP_TIMEOUT_S)
            tasks.cancel_scope.cancel()
        for journal in self.client.journals:
            await anyio.to_thread.run_sync(journal.close)
        await anyio.to_thread.run_sync(self.grammars.close)
        self.one_shots.close()

    async def _watch_engine(self) -> None:
        """Load what reads inputs beside the engine, say how both went, and say so if the engine ends by itself."""
        error: Exception | None = None
        try:
            self.generator.tokenizer = await anyio.to_thread.run_sync(self._load_tokenizer, abandon_on_cancel=True)
            await anyio.to_thread.run_sync(self.one_shots.load_readers, abandon_on_cancel=True)
            self._ollama.details = await anyio.to_thread.run_sync(self._read_details, abandon_on_cancel=True)
        except HeadraceError as exception:
            error = exception
        else:
            await self.client.settled.wait()
            error = self.client.error
            if error is None:
                error = await self._warm_up()
            if error is None and self.journal is not None:
                await restore_streams(self.journal, self.generator, self._shelves)
                if self._shared is not None:
                    await self._shared.take_over_own()
        if self.client.is_draining:
            return
        self.settled.set()
        self._on_engine_change(error)
        await self.client.stopped.wait()
        if not self.client.is_draining and error is None:
            self._on_engine_change(self.client.error or RuntimeError("the engine has ended"))

    async def take_over_left(self) -> None:
        """Go on with what replicas have left in the folder that they share, whose names no other will bear."""
        if self._shared is not None:
            await self._shared.take_over_left()

    async def _warm_up(self) -> Exception | None:
        try:
            await self.one_shots.warm_up()
        except ApiError as error:
            return self.client.error or ModelSourceError(f"a one-shot model computes nothing: {error}")
        return None

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(_SWEEP_INTERVAL_S)
            self.registry.sweep(self.client.clock())
            self.responses.sweep(self.client.clock())
            self.idempotency.sweep()
            if self._shared is not None:
                await self._shared.sweep()

    async def _measure_lag(self) -> None:
        while True:
            started_s = self.client.clock()
            await anyio.sleep(_LAG_INTERVAL_S)
            self.metrics.loop_lag.observe(max(0.0, self.client.clock() - started_s - _LAG_INTERVAL_S))

    def _probes(self) -> list[Route]:
        return [Route("/health", self._health), *(Route(path, self._ready) for path in ("/ready", "/health_generate"))]

    def _operators_routes(self) -> list[Route]:
        return [
            Route("/metrics", self._metrics),
            Route("/metrics/load", self._load_metrics),
            Route("/get_load", self._router_api.ranks),
            Route("/v1/loads", self._router_api.loads),
            Route("/dashboard", _page("dashboard.html")),
        ]

    def _admin_routes(self) -> list[Route]:
        return [
            Route("/admin/profile", self._endpoint(self._admin_api.profile), methods=["POST"]),
            Route("/admin/stacks", self._endpoint(self._admin_api.stacks), methods=["GET"]),
            Route("/admin/requests", self._endpoint(self._admin_api.requests), methods=["GET"]),
        ]

    def _endpoint(
        self,
        respond: Callable[[Request, bytes], Awaitable[Response]],
        refuse: Refuse = error_response,
        max_body_bytes: int | None = None,
        media_types: tuple[str, ...] = ("application/json",),
        idempotency: Idempotency | None = None,
    ) -> Endpoint:
        return Endpoint(
            respond,
            max_body_bytes=max_body_bytes or self.settings.max_body_bytes,
            media_types=media_types,
            receive_timeout_s=self.settings.receive_timeout_s,
            receiving=self._receiving,
            on_disconnect=lambda: self.metrics.count_cancelled("body"),
            on_rejected=self.report_refusal,
            refuse=refuse,
            idempotency=idempotency,
            gateway=self._gateway,
        )

    def _routes(self) -> list[Route | Mount]:
        openai = OpenAIApi(self._answering, self.one_shots)
        one_shot = OneShotApi(self.one_shots, self.limits, self.metrics, self.settings.request_timeout_s)
        messages = MessagesApi(self._answering)
        ollama = self._ollama
        tokens = TokensApi(self.generator)
        native, responses, endpoint = self._native, self._responses, self._endpoint
        is_operators = self.settings.admin_port is None
        generation_endpoint = partial(endpoint, idempotency=self.idempotency)
        return [
            Route("/", _page("index.html", _origins(self.settings.peers.values()))),
            Route("/classify", _page("classify.html")),
            Route("/docs", _page("docs.html")),
            _STATIC_ROUTE,
            *self._probes(),
            *(self._operators_routes() if is_operators else []),
            *(self._admin_routes() if is_operators and self.settings.is_private else []),
            Route("/openapi.json", OpenApi(self.settings).get),
            Route("/version", self._version),
            *(Route(path, self._router_api.server_info) for path in ("/server_info", "/get_server_info")),
            Route("/v1/models", openai.models),
            Route("/v1/models/{id:path}", endpoint(openai.model), methods=["GET"]),
            Route("/v1/chat/completions", generation_endpoint(openai.chat_completions), methods=["POST"]),
            Route("/v1/completions", generation_endpoint(openai.completions), methods=["POST"]),
            Route("/v1/responses", generation_endpoint(responses.create), methods=["POST"]),
            Route("/v1/responses/{id}", endpoint(responses.retrieve_or_delete), methods=["GET", "DELETE"]),
            Route(
                "/v1/responses/{id}/cancel",
                endpoint(responses.cancel, media_types=("application/json", "")),  # it may come without a body
                methods=["POST"],
            ),
            Route("/v1/responses/{id}/input_items", endpoint(responses.input_items), methods=["GET"]),
            Route("/v1/messages", generation_endpoint(messages.create), methods=["POST"]),
            Route("/v1/messages/count_tokens", endpoint(messages.count_tokens), methods=["POST"]),
            Route("/api/chat", generation_endpoint(ollama.chat), methods=["POST"]),
            Route("/api/generate", generation_endpoint(ollama.generate), methods=["POST"]),
            Route("/api/show", endpoint(ollama.show), methods=["POST"]),
            Route("/api/tags", ollama.tags),
            Route("/api/ps", ollama.running),
            Route("/api/version", ollama.version),
            Route("/tokenize", endpoint(tokens.tokenize), methods=["POST"]),
            Route("/detokenize", endpoint(tokens.detokenize), methods=["POST"]),
            Route("/v1/embeddings", endpoint(one_shot.embeddings), methods=["POST"]),
            *(
                Route(path, endpoint(one_shot.rerank), methods=["POST"])
                for path in ("/v1/rerank", "/v2/rerank", "/rerank")
            ),
            *(Route(path, endpoint(one_shot.score), methods=["POST"]) for path in ("/v1/score", "/score")),
            Route(
                "/v1/classify",
                endpoint(
                    one_shot.classify,
                    max_body_bytes=self.settings.max_image_bytes,
                    media_types=("application/json", "multipart/form-data"),
                ),
                methods=["POST"],
            ),
            Route("/v1/stream", endpoint(native.open, refuse_event_source), methods=["GET"]),
            Route("/v1/stream/tickets", native.issue_ticket, methods=["POST"]),
            Route("/v1/streams", generation_endpoint(native.create), methods=["POST"]),
            Route("/v1/streams/{id}", endpoint(native.snapshot_or_cancel), methods=["GET", "DELETE"]),
            Route("/v1/streams/{id}/events", endpoint(native.events, refuse_event_source), methods=["GET"]),
        ]

    def report_refusal(self, id: str, path: str, received_s: float, status: int) -> None:
        """Count and log a request that was refused, wherever that was."""
        self.metrics.rejected.labels(str(status)).inc()
        log_unaccepted(id, declared_route(path, self.asgi.routes), received_s, f"refused: {status}")

    def _report(self, generations: Sequence[Generation], route: str, trace_context: Mapping[str, str]) -> None:
        """Log, and trace, the generations of a request that is over."""
        log_request(generations, route)
        if self._tracing is not None:
            self._tracing.record(generations, route, trace_context)

    async def _health(self, request: Request) -> Response:
        """Alive: the loop answers, and the engine thread neither has ended nor hangs in a step."""
        fault = self.engine_fault
        content = {"status": fault or "ok", "step_age_s": round(self.watchdog.step_age_s, 3)}
        return JSONResponse(content, 503 if fault else 200)

    async def _ready(self, request: Request) -> Response:
        """Ready: the model is loaded and warm, and the server is not draining."""
        if self.is_ready:
            return JSONResponse({"status": "ready"})
        status = "draining" if self.is_leaving or self.client.is_draining else "loading"
        return JSONResponse({"status": self.engine_fault or status}, 503)

    @property
    def engine_fault(self) -> str | None:
        """Why this process serves nothing any more; None while it does."""
        if self.client.stopped.is_set():
            return "engine_dead"
        return None if self.watchdog.hung is None else f"{self.watchdog.hung}_hung"

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def _metrics(self, request: Request) -> Response:
        exposed = bytearray()
        for part in self.metrics.expose_each():
            exposed += part
            await anyio.lowlevel.checkpoint()
        return Response(bytes(exposed), media_type=_EXPOSITION)

    async def _load_metrics(self, request: Request) -> Response:
        return Response(self.metrics.expose_load(), media_type=_EXPOSITION)


class _PageFiles(StaticFiles):
    """The page's parts, asked for anew like the page itself: parts of two versions would not fit each other."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


def _page(name: str, others: Sequence[str] = ()) -> Callable[[Request], Awaitable[Response]]:
    """A page that may call this server, and `others` by their origins."""
    # Of others' content a page shows the pictures its user drops on it.
    policy = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'"
    if others:
        policy += f"; connect-src 'self' {' '.join(others)}"

    async def page(request: Request) -> Response:
        return FileResponse(_STATIC / name, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    return page


def _origins(urls: Iterable[str]) -> list[str]:
    return sorted({f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, urls) if parts.netloc})


_STATIC_ROUTE = Mount("/static", _PageFiles(directory=_STATIC))
