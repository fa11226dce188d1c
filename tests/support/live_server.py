"""An App on the fake model behind a real socket, in a thread of this process, so that a test can hold its steps."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from fake_engine import FakeRunner, byte_tokenizer, make_scheduler
from fake_one_shots import FakeOneShot
from headrace.scheduler.scheduler import Scheduler
from headrace.server.app import App
from headrace.server.settings import load_settings


class LiveServer(uvicorn.Server):
    """The server; `url` is its address, `runner` and `app` its insides. Only `runner` is for other threads."""

    def __init__(
        self,
        runner: FakeRunner,
        scheduler: Scheduler,
        port: int,
        one_shots: Sequence[FakeOneShot],
        settings: dict[str, Any],
    ) -> None:
        self.runner = runner
        self._is_settled = threading.Event()
        settings = {"ttft_targets_s": "1e6,1e6,1e6"} | settings  # a held step would teach that steps are slow
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self.app = App(
            load_settings(flags, {}),
            "fake",
            lambda: (scheduler, runner),
            byte_tokenizer,
            lambda _: self._is_settled.set(),
            one_shots=[one_shot.source for one_shot in one_shots],
            load_one_shots=lambda: {one_shot.source.name: one_shot.model for one_shot in one_shots},
        )
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app.asgi,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=2**20,  # else a long URL is refused when it comes in pieces, and only then
        )
        super().__init__(config)
        self._thread = threading.Thread(target=self.run, args=([self._listener],))

    def start(self) -> None:
        self._thread.start()
        assert self._is_settled.wait(60)

    def stop(self) -> None:
        """End it as a crash would look from outside: no drain."""
        self.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def live_server(
    *,
    runner: FakeRunner | None = None,
    scheduler: Scheduler | None = None,
    port: int = 0,
    one_shots: Sequence[FakeOneShot] = (),
    **settings: Any,
) -> Iterator[LiveServer]:
    """A server that is ready, stopped afterwards."""
    server = LiveServer(runner or FakeRunner(), scheduler or make_scheduler(), port, one_shots, settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
