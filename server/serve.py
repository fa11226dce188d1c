"""`headrace serve`: settings to a listening server, and signals to an orderly end."""

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from headrace.scheduler.config import EngineConfig, OneShotConfig
from headrace.scheduler.engine_core import Runner
from headrace.scheduler.errors import HeadraceError, ModelSourceError
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.model_source import ModelSource, resolve_model
from headrace.scheduler.one_shot_runner import OneShotModel
from headrace.scheduler.scheduler import Scheduler
from headrace.server.admin import ByPort
from headrace.server.api_keys import ApiKeys
from headrace.server.app import App
from headrace.server.connection_limit import ConnectionLimit, affordable_connections
from headrace.server.drain import Drainable, drain, take_leave
from headrace.server.http_protocol import HttpProtocol, watch_peers
from headrace.server.log_format import LogFormatter, log_loop_error
from headrace.server.metrics import RequestMetrics
from headrace.server.model_details import read_model_details
from headrace.server.one_shot_models import OneShotSource
from headrace.server.settings import ListenerSettings, OneShotModelSettings, Settings, is_loopback
from headrace.server.tls import load_tls
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from headrace.server.tracing import Tracing, open_tracing
from headrace.server.version import VERSION

# How long a client that reads nothing may hold up the end, once its last event is written.
_CLOSE_TIMEOUT_S = 5
_BACKLOG = 2048
# How long the event loop may keep the interpreter's lock when the engine wants it. The default of 5 ms is as long as a
# step; far below 1 ms both slow each other down.
SWITCH_INTERVAL_S = 0.001
# transformers imports its parts when they are first named, and fails where two threads do so at once.
_LOADING = threading.Lock()
# How often torch's threads look for work before they sleep: by default for milliseconds, on the cores that the next
# step of streams needs.
_OPENMP_SPINS = "2000"

LoadEngine = Callable[[], tuple[Scheduler, Runner]]
S = TypeVar("S", bound=ListenerSettings)


class ListenError(HeadraceError):
    """The address cannot be listened on."""


def serve(settings: Settings, load_engine: LoadEngine | None = None) -> int:
    """Serve until a signal ends it; returns the process's exit code.

    `load_engine` makes an engine other than the settings' own: one for measuring the server without a model's time.
    """
    start_logging(settings)
    started_s = time.monotonic()
    try:
        # First what is quickly told: a port that is taken should not cost the time a model takes to load.
        tls = load_tls(settings)
        listeners = listen(settings)
        # Who reads another replica's stream may cost a second descriptor, which tells its writer so.
        settings = within_descriptors(settings, 1 if settings.journal_dir is None else 2)
        server = _Server(settings, load_engine, listeners, tls, started_s)
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    return server.serve_until_signal()


def make_app(
    settings: Settings,
    on_engine_change: Callable[[Exception | None], None],
    tracing: Tracing | None = None,
    load_engine: LoadEngine | None = None,
) -> App:
    """The App of the settings' models, which are found, and fetched, and not loaded yet. Raises: HeadraceError."""
    source = resolve_model(settings.model, say)
    one_shots = [_resolve_one_shot(one_shot) for one_shot in settings.one_shot_models]
    if one_shots:
        os.environ.setdefault("GOMP_SPINCOUNT", _OPENMP_SPINS)  # read when torch is imported
    adapters = [_find_adapter(name, folder) for name, folder in settings.lora_adapters.items()]
    name = settings.served_model_name or source.name
    _check_names([name, *(one_shot.name for one_shot in one_shots), *(adapter.name for adapter in adapters)])
    return App(
        settings,
        name,
        load_engine=load_engine or partial(_load_engine, settings, source, adapters),
        load_tokenizer=lambda: _load_tokenizer(settings, source),
        on_engine_change=on_engine_change,
        tracing=tracing,
        one_shots=one_shots,
        load_one_shots=partial(_load_one_shots, settings, one_shots),
        model_fingerprint=source.fingerprint() if settings.has_journal else "",
        read_details=partial(read_model_details, source),
        adapters={each.name: each.fingerprint() if settings.has_journal else "" for each in adapters},
    )


def start_logging(settings: ListenerSettings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    for name in ("uvicorn", "PIL", "httpcore"):  # which tell what clients send where they tell all
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for every malformed form


def listen(settings: ListenerSettings) -> list[socket.socket]:
    """The clients' listener, and behind it the operator's, if there is one. Raises: ListenError."""
    addresses = [(settings.host, settings.port)]
    if settings.admin_port is not None:
        addresses.append((settings.admin_host, settings.admin_port))
    listeners = []
    for host, port in addresses:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listeners.append(socket.create_server((host, port), family=family, backlog=_BACKLOG))
        except OSError as error:
            raise ListenError(f"cannot listen on host {host}, port {port}: {error.strerror or error}") from None
        watch_peers(listeners[-1], settings.peer_timeout_s)
    return listeners


def within_descriptors(settings: S, descriptors_each: int = 1) -> S:
    """The settings, with no more connections than this process has descriptors for."""
    num_connections = affordable_connections(settings.max_connections, descriptors_each)
    if num_connections < settings.max_connections:
        say(f"{num_connections} connections at most, not {settings.max_connections}: see ulimit -n")
    return settings.model_copy(update={"max_connections": num_connections})


def say(line: str) -> None:
    print(f"headrace: {line}", flush=True)


class ServedApp(Drainable, Protocol):
    """This package's App, or the proxy."""

    keys: ApiKeys | None
    asgi: Starlette
    admin: Starlette

    @property
    def metrics(self) -> RequestMetrics: ...

    def reload_keys(self) -> None: ...

    def report_refusal(self, id: str, path: str, received_s: float, status: int) -> None: ...


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain of our own: a first signal starts it, a second one cuts it short. `url` is its address,
    `admin_url` the operator's."""

    def __init__(
        self,
        app: ServedApp,
        settings: ListenerSettings,
        listeners: Sequence[socket.socket],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listeners = list(listeners)
        self.url, self.admin_url, *_ = [*(_url(listener, tls) for listener in listeners), None]
        self._drained = app
        self._delay_s = settings.drain_delay_s
        self._grace_s = settings.drain_grace_s
        self._is_asked_to_end = False
        self._hurried = anyio.Event()
        self._is_closing = False
        limit = ConnectionLimit(settings.max_connections, app.metrics)
        asgi: ASGIApp = app.asgi
        if len(listeners) > 1:
            asgi = ByPort(app.asgi, app.admin, listeners[1].getsockname()[1])
        config = uvicorn.Config(
            asgi,
            backlog=_BACKLOG,
            loop="uvloop",
            # Made of h11, which answers clients that offer HTTP/2, and tells a stream of a disconnect behind a
            # pipelined request: httptools, the faster parser, does neither.
            http=partial(HttpProtocol, settings, limit, app.report_refusal, tls),  # type: ignore[arg-type]  # a class, as far as uvicorn calls it
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a peer is who it is, whatever its X-Forwarded-For says
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=2 * _CLOSE_TIMEOUT_S,  # never reached: see _cut_connections
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's: callbacks on the loop, which may touch what lives there."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_error)
        # A terminal that closes ends what it started; a service is told by SIGHUP to read its files again.
        is_in_terminal = self._drained.keys is None and sys.stdin is not None and sys.stdin.isatty()
        on_hang_up = self._end if is_in_terminal else self._drained.reload_keys
        callbacks = {signal.SIGINT: self._end, signal.SIGTERM: self._end, signal.SIGHUP: on_hang_up}
        for number, callback in callbacks.items():
            loop.add_signal_handler(number, callback)
        try:
            yield
        finally:
            for number in callbacks:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self._is_closing:
            self._cut_connections()
        elif self.should_exit:
            self._hurried.set()
        self.should_exit = self._is_asked_to_end = True

    async def main_loop(self) -> None:
        await super().main_loop()
        self._end_connections()
        # The listener is still open: who asks now is told that the server is going, and /ready says so.
        if self._is_asked_to_end and self._delay_s and self._drained.has_been_ready:
            say(f"ready no more; taking requests for another {self._delay_s:g} s")
            await take_leave(self._drained, self._delay_s, self._hurried)
        if self._drained.num_unfinished:
            say(f"draining {self._drained.num_unfinished} requests; a second signal cuts this short")
        await drain(self._drained, self._grace_s, self._hurried)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._is_closing = True
        cut = asyncio.get_running_loop().call_later(_CLOSE_TIMEOUT_S, self._cut_connections)
        await super().shutdown(sockets)
        cut.cancel()

    def _end_connections(self) -> None:
        """Make every answer that has not begun its connection's last. A client that keeps one would come back on it,
        and be refused, while a new one leads to another replica."""
        headers = [*self.server_state.default_headers, (b"connection", b"close")]
        self.server_state.default_headers = headers
        for connection in self.server_state.connections:
            if isinstance(connection, HttpProtocol) and connection.cycle is not None:
                connection.cycle.default_headers = headers

    def _cut_connections(self) -> None:
        """Let go of clients that do not read; uvicorn would cancel their tasks in the middle, with a traceback each."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _url(listener: socket.socket, tls: ssl.SSLContext | None) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(DrainingServer):
    """A server of models, from its loading to its end."""

    def __init__(
        self,
        settings: Settings,
        load_engine: LoadEngine | None,
        listeners: Sequence[socket.socket],
        tls: ssl.SSLContext | None,
        started_s: float,
    ) -> None:
        """Raises: HeadraceError."""
        self._started_s = started_s
        self._settings = settings
        self._error: Exception | None = None
        endpoint = settings.otlp_traces_endpoint
        self._tracing = None if endpoint is None else open_tracing(endpoint)
        self._app = make_app(settings, self._report, self._tracing, load_engine)
        super().__init__(self._app, settings, listeners, tls)

    def serve_until_signal(self) -> int:
        if self._app.keys is None and not is_loopback(self._settings.host):
            say("anyone who reaches this address may use it: there are no keys (see api_keys_file)")
        say(f"version {VERSION}, loading {self._app.generator.model_name}, listening on {self.url}")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.run(self._listeners)
        if self._tracing is not None:
            self._tracing.close()
        code = 1 if self._error is not None else 0
        client = self._app.client
        if (
            client.has_thread
            or any(journal.has_thread for journal in client.journals)
            or not self._app.settled.is_set()
        ):
            # A thread is inside the model or waits for a disk, where no Python can end it; leaving by the front door
            # would wait for it, or abort in C++.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        return code

    def _report(self, error: Exception | None) -> None:
        if error is not None:
            self._error = error
            print(f"headrace: {error}", file=sys.stderr, flush=True)
            self.should_exit = True
            return
        settle_memory()
        assert self._app.client.ready is not None
        name = self._app.generator.model_name
        url = self.url
        say(f"{name}: {self._app.client.ready.description}")
        for one_shot in self._app.client.ready.one_shots:
            say(f"{one_shot.description}, {one_shot.num_bytes / 2**20:.0f} MiB")
        say(f"ready after {time.monotonic() - self._started_s:.1f} s")
        say(f"chat page: {url}/")
        if self.admin_url is not None:
            say(f"metrics: {self.admin_url}/metrics")
        say(f"dashboard: {self.admin_url or url}/dashboard")
        body = '{"messages": [{"role": "user", "content": "Tell me a joke."}], "stream": true}'
        key = "" if self._app.keys is None else " -H 'authorization: Bearer YOUR_KEY'"
        say(f"try: curl -N {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'")


def settle_memory() -> None:
    """Let go of what only loading needs, keep what it made out of every later collection, and collect seldom.

    A full one walks the libraries' half a million objects, and all streams stand meanwhile. With the default threshold
    of 700 every step of a few hundred streams sets off a small one, which finds next to nothing: reference counts free
    all but the hundred objects of a stream whose client left (a cancelled task's exception refers to itself).
    """
    open_gguf.cache_clear()  # the engine and the tokenizer have both read it
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _load_engine(settings: Settings, source: ModelSource, adapters: Sequence[ModelSource]) -> tuple[Scheduler, Runner]:
    targets_ms = settings.itl_targets_ms
    config = EngineConfig(
        model_path=source.path,
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        # Before the watchdog ends the process: the streams are then told why.
        collective_timeout_s=settings.watchdog_hard_s / 2,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        quantization=settings.quantization,
        load_format=settings.load_format,
        gpu_attention=settings.gpu_attention,
        cpu_kernel=settings.cpu_kernel,
        cpu_activations=settings.cpu_activations,
        batch_invariant=settings.batch_invariant,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size,
        kv_cache_bytes=None if settings.kv_cache_bytes == "auto" else settings.kv_cache_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=settings.enable_prefix_caching,
        speculative_tokens=settings.speculative_tokens,
        speculation_max_seqs=settings.speculation_max_seqs,
        tier_weights=settings.tier_weights,
        one_shot_share=settings.one_shot_share,
        itl_targets_s=None if targets_ms == "auto" else tuple(target_ms / 1000 for target_ms in targets_ms),
        lora_adapters={each.name: each.path for each in adapters},
    )
    with _LOADING:
        # Imported on the engine thread: torch takes a second or two, and the server listens meanwhile.
        from headrace.scheduler.model_loader import load_engine

        return load_engine(config, say)


def _resolve_one_shot(settings: OneShotModelSettings) -> OneShotSource:
    """Raises: ModelSourceError."""
    source = resolve_model(settings.model, say)
    if source.is_gguf:
        raise ModelSourceError(f"{settings.model}: a one-shot model is a Hugging Face directory, not a .gguf file")
    return OneShotSource(settings.name or source.name, source.path, settings)


def _find_adapter(name: str, folder: str) -> ModelSource:
    """Raises: ModelSourceError."""
    path = Path(os.path.expanduser(folder))
    if not (path / "adapter_config.json").is_file():
        raise ModelSourceError(f"lora_adapters: {name}: {folder} is no directory with an adapter_config.json")
    return ModelSource(path, name)


def _check_names(names: Sequence[str]) -> None:
    """Raises: ModelSourceError where two models have one name."""
    for name in names:
        if names.count(name) > 1:
            raise ModelSourceError(f"two models are served as {name}: give one of them another `name`")


def _load_one_shots(settings: Settings, sources: Sequence[OneShotSource]) -> Mapping[str, OneShotModel]:
    if not sources:
        return {}
    with _LOADING:
        from headrace.scheduler.model_loader import choose_device
        from headrace.scheduler.one_shot_model import load_one_shot_model

        device = str(choose_device(settings.device))
        return {
            source.name: load_one_shot_model(
                OneShotConfig(source.name, source.path, source.settings.task, device, source.settings.dtype)
            )
            for source in sources
        }


def _load_tokenizer(settings: Settings, source: ModelSource) -> Tokenizer:
    with _LOADING:
        return load_tokenizer(source, keeps_control_tokens=settings.control_tokens_in_messages == "control")
