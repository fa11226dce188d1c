"""`headrace serve`: settings to a listening server, and signals to an orderly end."""

import logging
import os
import socket
import ssl
import sys
import threading
import time
from types import FrameType

import uvicorn

from headrace.scheduler.config import EngineConfig
from headrace.scheduler.engine_core import Runner
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.gguf_file import open_gguf
from headrace.scheduler.model_source import ModelSource, resolve_model
from headrace.scheduler.scheduler import Scheduler
from headrace.server.app import App
from headrace.server.settings import Settings
from headrace.server.tls import load_tls
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from headrace.server.tracing import open_tracing
from headrace.server.version import VERSION

# How long a client that reads nothing may hold up the end, once its last event is written.
_CLOSE_TIMEOUT_S = 5
_BACKLOG = 2048
# transformers imports its parts when they are first named, and fails where two threads do so at once.
_LOADING = threading.Lock()


class ListenError(HeadraceError):
    """The address cannot be listened on."""


def serve(settings: Settings) -> int:
    """Serve until a signal ends it; returns the process's exit code."""
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    started_s = time.monotonic()
    try:
        # First what is quickly told: a port that is taken should not cost the time a model takes to load.
        tls = load_tls(settings)
        listener = _listen(settings.host, settings.port)
        server = _Server(settings, resolve_model(settings.model, say), listener, tls, started_s)
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    return server.serve_until_signal()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ListenError(f"cannot listen on host {host}, port {port}: {error.strerror or error}") from None


def say(line: str) -> None:
    print(f"headrace: {line}", flush=True)


class _Server(uvicorn.Server):
    """uvicorn with a drain of our own: a first signal starts it, a second one cuts it short."""

    def __init__(
        self,
        settings: Settings,
        source: ModelSource,
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        started_s: float,
    ) -> None:
        self._listener = listener
        host, port = listener.getsockname()[:2]
        self._url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        self._started_s = started_s
        self._settings = settings
        self._error: Exception | None = None
        self._is_hurried = False
        name = settings.served_model_name or source.name
        endpoint = settings.otlp_traces_endpoint
        self._tracing = None if endpoint is None else open_tracing(endpoint, name)
        self._app = App(
            settings,
            name,
            load_engine=lambda: _load_engine(settings, source),
            load_tokenizer=lambda: _load_tokenizer(source),
            on_engine_change=self._report,
            tracing=self._tracing,
        )
        config = uvicorn.Config(
            self._app.asgi,
            backlog=_BACKLOG,
            loop="uvloop",
            # Bounds headers, answers clients that offer HTTP/2, and tells a stream of a disconnect behind a pipelined
            # request: httptools, the faster parser, does none of these.
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            ssl_context_factory=(lambda config, default: tls) if tls else None,
        )
        super().__init__(config)

    def serve_until_signal(self) -> int:
        say(f"version {VERSION}, loading {self._app.generator.model_name}, listening on {self._url}")
        self.run([self._listener])
        if self._tracing is not None:
            self._tracing.close()
        code = 1 if self._error is not None else 0
        if self._app.client.has_thread:
            # It is inside the model, where no Python can end it; leaving by the front door would abort in C++.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        return code

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._is_hurried = self.should_exit
        self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()
        # The listener is still open: who asks now is told that the server is going, and /ready says so.
        if self._app.client.num_unfinished:
            say(f"draining {self._app.client.num_unfinished} requests; a second signal cuts this short")
        await self._app.drain(lambda: self._is_hurried)

    def _report(self, error: Exception | None) -> None:
        if error is not None:
            self._error = error
            print(f"headrace: {error}", file=sys.stderr, flush=True)
            self.should_exit = True
            return
        open_gguf.cache_clear()  # the engine and the tokenizer have both read it
        assert self._app.client.ready is not None
        name = self._app.generator.model_name
        url = self._url
        say(f"{name}: {self._app.client.ready.description}")
        say(f"ready after {time.monotonic() - self._started_s:.1f} s")
        say(f"chat page: {url}/")
        body = '{"messages": [{"role": "user", "content": "Tell me a joke."}], "stream": true}'
        say(f"try: curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")


def _load_engine(settings: Settings, source: ModelSource) -> tuple[Scheduler, Runner]:
    config = EngineConfig(
        model_path=source.path,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size,
        kv_cache_bytes=None if settings.kv_cache_bytes == "auto" else settings.kv_cache_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    with _LOADING:
        # Imported on the engine thread: torch takes a second or two, and the server listens meanwhile.
        from headrace.scheduler.model_loader import load_engine

        return load_engine(config)


def _load_tokenizer(source: ModelSource) -> Tokenizer:
    with _LOADING:
        return load_tokenizer(source)
