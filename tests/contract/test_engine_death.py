"""An engine thread that dies or hangs: every request it had gets its one end, and the server says so."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, make_scheduler
from headrace.scheduler.engine_core import LaunchedStep
from headrace.scheduler.scheduler import SchedulerOutput
from headrace.server.settings import load_settings
from live_app import LiveApp

pytestmark = pytest.mark.anyio


class MortalRunner(FakeRunner):
    """Ends its thread in the step after `is_dying` was set."""

    is_dying = False

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        step = super().launch(output)
        if self.is_dying:
            raise SystemExit("as told")
        return step


@asynccontextmanager
async def with_two_running(runner: FakeRunner) -> AsyncIterator[tuple[LiveApp, list[Exchange]]]:
    """An app, and requests of every kind: those first are running, those behind them wait."""
    settings = load_settings(["--ttft-targets-s", "[1e6,1e6,1e6]"], {})
    app = LiveApp(settings, runner, make_scheduler(max_num_seqs=2))
    async with app.asgi.router.lifespan_context(app.asgi), anyio.create_task_group() as tasks:
        await app.settled.wait()
        with runner.held():
            requests = []
            for i in range(2):
                native = (await call(app.asgi, "POST", "/v1/streams", {"prompt": "hi", "max_tokens": 90})).json()
                requests.append(exchange(app.asgi, "GET", native["events_url"]))
                requests[-1].send_body(b"")
                for path, body in (
                    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
                    ("/v1/completions", {"prompt": "hi", "stream": True}),
                    ("/v1/completions", {"prompt": "hi"}),
                ):
                    requests.append(exchange(app.asgi, "POST", path))
                    requests[-1].send_body(json.dumps(body | {"max_tokens": 90}).encode())
                for request in requests[-4:]:
                    tasks.start_soon(request.run)
                await app.until(lambda i=i: app.client.num_unfinished == 4 * (i + 1))  # type: ignore[misc]
                runner.allow(1)
            await app.until(lambda: (app.client.load.num_running, app.client.num_waiting) == (2, 6))
            yield app, requests


def assert_ended_once(requests: list[Exchange], message: str) -> None:
    for i, request in enumerate(requests):
        assert request.is_complete
        assert request.body.count(b'"code":"engine_error"') == request.body.count(message.encode()) == 1
        assert b"[DONE]" not in request.body
        if i % 4 == 0:
            assert request.body.count(b"event: error") == 1
            assert b"event: done" not in request.body
        assert request.status == (500 if i % 4 == 3 else 200)


async def probes(app: LiveApp) -> list[tuple[int | None, str]]:
    answers = [await call(app.asgi, "GET", path) for path in ("/health", "/ready")]
    return [(answer.status, answer.json()["status"]) for answer in answers]


async def test_an_engine_thread_that_dies_gives_all_that_run_and_wait_their_one_end() -> None:
    runner = MortalRunner()
    async with with_two_running(runner) as (app, requests):
        runner.is_dying = True
        runner.allow(1)
        for request in requests:
            await request.done.wait()
        assert await probes(app) == [(503, "engine_dead")] * 2
    assert_ended_once(requests, "the engine has ended")


async def test_an_engine_that_hangs_is_said_to_and_gives_all_that_run_and_wait_their_one_end_when_given_up() -> None:
    async with with_two_running(FakeRunner()) as (app, requests):
        app.watchdog.look(1)
        for _ in range(5):
            app.watchdog.look(2)
        assert await probes(app) == [(200, "ok"), (200, "ready")], "as long as the setting allows"
        app.watchdog.look(2)
        assert await probes(app) == [(503, "engine_hung")] * 2
        app.watchdog._end_unfinished()
        for request in requests:
            await request.done.wait()
    assert_ended_once(requests, "the engine hangs")


async def test_an_engine_thread_that_dies_is_told_in_the_form_of_each_api() -> None:
    runner = MortalRunner()
    app = LiveApp(load_settings(["--ttft-targets-s", "[1e6,1e6,1e6]"], {}), runner, make_scheduler(max_num_seqs=2))
    chat: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}
    asked: dict[str, dict[str, object]] = {
        "/v1/responses": {"input": "hi"},
        "/v1/messages": chat | {"max_tokens": 90},
        "/api/chat": chat,
        "/api/generate": {"prompt": "hi"},
    }
    async with app.asgi.router.lifespan_context(app.asgi), anyio.create_task_group() as tasks:
        await app.settled.wait()
        with runner.held():
            kept = (await call(app.asgi, "POST", "/v1/responses", {"input": "hi", "background": True})).json()
            requests = [(exchange(app.asgi, "POST", path), stream) for path in asked for stream in (True, False)]
            for request, stream in requests:
                request.send_body(json.dumps(asked[request.scope["path"]] | {"stream": stream}).encode())
                tasks.start_soon(request.run)
            await app.until(lambda: app.client.num_unfinished == 1 + len(requests))
            runner.is_dying = True
            runner.allow(1)
            for request, _ in requests:
                await request.done.wait()
        response = (await call(app.asgi, "GET", f"/v1/responses/{kept['id']}")).json()
    assert (response["status"], response["error"]["message"]) == ("failed", "the engine has ended")
    for request, stream in requests:
        assert request.is_complete
        assert request.status == (200 if stream else 500)
        assert request.body.count(b"the engine has ended") == 1
        event = {"/v1/responses": b"event: response.failed\n", "/v1/messages": b"event: error\n"}
        if stream:
            assert event.get(request.scope["path"], b'{"error":') in request.body
