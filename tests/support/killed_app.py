"""An App that is killed in the middle of its streams."""

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fake_engine import FakeRunner
from live_app import LiveApp, live_app
from recorded_streams import crash


@asynccontextmanager
async def killed_app(
    path: Path, copy: Path, num_steps: int, *, runner: FakeRunner | None = None, **settings: Any
) -> AsyncIterator[tuple[LiveApp, Path]]:
    """An app whose runner makes so many steps; when the block is left its files are as a kill then would leave them."""
    kill = partial(crash, path, copy)
    async with app_until(kill, num_steps, journal_file=path, runner=runner or FakeRunner(), **settings) as app:
        yield app, copy / path.name


@asynccontextmanager
async def app_until(
    kill: Callable[[], object], num_steps: int, *, runner: FakeRunner, **settings: Any
) -> AsyncIterator[LiveApp]:
    """An app whose runner makes so many steps; when the block is left `kill` keeps its files as they are then."""
    with ExitStack() as held:
        held.enter_context(runner.held())
        runner.allow(num_steps)
        async with live_app(runner=runner, **settings) as app:
            try:
                yield app
                kill()
            finally:
                held.close()
