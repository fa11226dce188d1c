"""A whole App on the fake model, with its lifespan, inside a test's own event loop."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from fake_engine import FakeRunner, byte_tokenizer, make_scheduler
from headrace.scheduler.scheduler import Scheduler
from headrace.server.app import App
from headrace.server.settings import Settings, load_settings
from headrace.server.tracing import Tracing


class LiveApp(App):
    """An App whose runner and scheduler the test can see."""

    def __init__(
        self, settings: Settings, runner: FakeRunner, scheduler: Scheduler, tracing: Tracing | None = None
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        super().__init__(settings, "fake", lambda: (scheduler, runner), byte_tokenizer, tracing=tracing)

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Wait until `predicate()` holds: what the engine thread does is seen when its publication arrives."""
        with anyio.fail_after(20):
            while not predicate():  # noqa: ASYNC110 - no event tells of every publication
                await anyio.sleep(0.001)


@asynccontextmanager
async def live_app(
    *,
    runner: FakeRunner | None = None,
    scheduler: Scheduler | None = None,
    tracing: Tracing | None = None,
    **settings: Any,
) -> AsyncIterator[LiveApp]:
    """Start an App, wait until it is ready, stop it; afterwards no block is held and no generation is left."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()]
    app = LiveApp(load_settings(flags, {}), runner or FakeRunner(), scheduler or make_scheduler(), tracing)
    async with app.asgi.router.lifespan_context(app.asgi):
        await app.settled.wait()
        yield app
    app.scheduler.check_books()
    assert not app.scheduler.has_work
    assert app.client.num_unfinished == 0
    assert app.scheduler.load().num_free_blocks == app.scheduler.load().num_total_blocks
