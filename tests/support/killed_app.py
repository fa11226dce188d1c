"""An App that is killed in the middle of its streams."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
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
    runner = runner or FakeRunner()
    with ExitStack() as held:
        held.enter_context(runner.held())
        runner.allow(num_steps)
        async with live_app(journal_file=path, runner=runner, **settings) as app:
            try:
                yield app, copy / path.name
                crash(path, copy)
            finally:
                held.close()
