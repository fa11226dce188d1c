"""A whole App on the fake model, with its lifespan, inside a test's own event loop."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from fake_engine import FakeRunner, byte_tokenizer, make_scheduler
from fake_one_shots import FakeOneShot
from headrace.scheduler.messages import Tier
from headrace.scheduler.scheduler import Scheduler
from headrace.server.app import App
from headrace.server.settings import Settings, load_settings
from headrace.server.tokenizer import Tokenizer
from headrace.server.tracing import Tracing


class LiveApp(App):
    """An App whose runner, scheduler and one-shot models the test can see."""

    def __init__(
        self,
        settings: Settings,
        runner: FakeRunner,
        scheduler: Scheduler,
        tracing: Tracing | None = None,
        one_shots: Sequence[FakeOneShot] = (),
        tokenizer: Tokenizer | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.fakes = {one_shot.source.name: one_shot.model for one_shot in one_shots}
        super().__init__(
            settings,
            "fake",
            lambda: (scheduler, runner),
            lambda: tokenizer or byte_tokenizer(keeps_control_tokens=settings.control_tokens_in_messages == "control"),
            tracing=tracing,
            one_shots=[one_shot.source for one_shot in one_shots],
            load_one_shots=lambda: self.fakes,
            adapters=adapters,
        )

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
    one_shots: Sequence[FakeOneShot] = (),
    tokenizer: Tokenizer | None = None,
    adapters: Mapping[str, str] | None = None,
    **settings: Any,
) -> AsyncIterator[LiveApp]:
    """Start an App, wait until it is ready, stop it; afterwards no block is held, and no generation and no item of a
    one-shot model is left.

    A step takes as long as a test holds it, so nobody is refused for what is predicted of such steps, unless the test
    sets its own `ttft_targets_s`.
    """
    settings = {"ttft_targets_s": "1e6,1e6,1e6"} | settings
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()]
    app = LiveApp(
        load_settings(flags, {}),
        runner or FakeRunner(),
        scheduler or make_scheduler(),
        tracing,
        one_shots,
        tokenizer,
        adapters,
    )
    async with app.asgi.router.lifespan_context(app.asgi):
        await app.settled.wait()
        for fake in app.fakes.values():
            fake.batches.clear()  # those of the warm-up
        yield app
    app.scheduler.check_books()
    assert not app.scheduler.has_work
    assert app.num_unfinished == len(app.client._batches) == len(app.client._questions) == 0
    assert app.client.num_unfinished == app.client.num_waiting == app.client.admission.num_queued_tokens == 0
    assert not any(app.client.admission.num_queued(tier) for tier in Tier)
    assert app.scheduler.load().num_free_blocks == app.scheduler.load().num_total_blocks
