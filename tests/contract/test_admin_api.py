"""What an operator asks of a slow server is answered while it serves, by whoever of it can, and to nobody else."""

import asyncio
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import make_scheduler
from fake_one_shots import FakeOneShot, write_text_model
from headrace.scheduler.config import OneShotTask
from headrace.scheduler.engine_core import EngineCore
from headrace.server.api_keys import append_key, create_key
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SECRET_TEXT = "unmistakable"
LONG_S = 60  # more than a profiler takes to begin on a machine that is busy with other things


def begin(app: LiveApp, method: str, path: str, body: dict[str, Any] | None = None) -> Exchange:
    """A request that is ready to be run in a task."""
    request = exchange(app.asgi, method, path)
    request.send_body(b"" if body is None else json.dumps(body).encode())
    return request


def generation(app: LiveApp, max_tokens: int = 10, **fields: Any) -> Exchange:
    body = {"prompt": SECRET_TEXT, "max_tokens": max_tokens, "temperature": 0, "stream": True} | fields
    return begin(app, "POST", "/v1/completions", body)


async def profile(app: LiveApp, **fields: Any) -> Exchange:
    return await call(app.asgi, "POST", "/admin/profile", fields)


def ranges(answer: Exchange) -> Counter[str]:
    """How many there are of each in a trace that was answered."""
    assert answer.status == 200, answer.body
    events = json.loads(gzip.decompress(answer.body))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


async def test_the_next_steps_are_traced_and_named() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        answer = begin(app, "POST", "/admin/profile", {"steps": 4, "timeout": LONG_S})
        tasks.start_soon(answer.run)
        await anyio.wait_all_tasks_blocked()
        stream = generation(app)
        tasks.start_soon(stream.run)
        await answer.done.wait()
        await stream.done.wait()
    assert ranges(answer) == dict.fromkeys(("schedule", "launch", "wait", "update", "publish"), 4)
    assert answer.headers["content-type"] == "application/gzip"
    assert 'filename="headrace-4-steps.json.gz"' in answer.headers["content-disposition"]


async def test_what_there_is_of_a_trace_is_answered_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        answer = begin(app, "POST", "/admin/profile", {"steps": 100, "timeout": LONG_S})
        tasks.start_soon(answer.run)
        await app.until(lambda: bool(app.client._questions))
        stream = generation(app)
        with app.runner.held():
            tasks.start_soon(stream.run)
            app.runner.allow(3)
            await app.until(lambda: app.runner.num_begun == 4)
            monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + LONG_S)
            await app.until(lambda: bool(app.client._engine._cancels))  # type: ignore[attr-defined]
        await answer.done.wait()
        await stream.done.wait()
    # The last one was held up when the time was over.
    assert ranges(answer)["launch"] == 4


async def test_an_idle_engine_is_said_to_be_idle() -> None:
    async with live_app() as app:
        answer = await profile(app, timeout=0.01)
        assert answer.status == 504
        assert "nothing to compute for 0.01 s" in answer.json()["error"]["message"]
        assert (await call(app.asgi, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})).status == 200


async def test_one_trace_is_made_at_a_time_and_one_whose_client_left_is_given_up() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        first = begin(app, "POST", "/admin/profile", {"timeout": LONG_S})
        tasks.start_soon(first.run)
        await anyio.wait_all_tasks_blocked()
        refused = await profile(app, timeout=0.01)
        assert (refused.status, refused.json()["error"]["code"]) == (409, "tracing")
        first.disconnect()
        await first.done.wait()
        assert first.status is None
        await app.until(lambda: not app.client._is_tracing)
        assert (await profile(app, timeout=0.01)).status == 504


async def test_a_trace_that_fails_is_a_500_and_streams_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        monkeypatch.setattr(app.runner.tracer, "begin", lambda: 1 / 0)
        answer = begin(app, "POST", "/admin/profile", {"timeout": LONG_S})
        tasks.start_soon(answer.run)
        await anyio.wait_all_tasks_blocked()
        stream = generation(app)
        await stream.run()
        await answer.done.wait()
        assert (answer.status, answer.json()["error"]["code"]) == (500, "engine_error")
        assert stream.is_complete


async def test_a_trace_that_is_too_large_is_refused_and_names_what_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.admin_api._MAX_TRACE_BYTES", 100)
    async with live_app() as app, anyio.create_task_group() as tasks:
        answer = begin(app, "POST", "/admin/profile", {"steps": 2, "timeout": LONG_S})
        tasks.start_soon(answer.run)
        await anyio.wait_all_tasks_blocked()
        await generation(app).run()
        await answer.done.wait()
    assert (answer.status, answer.json()["error"]["param"]) == (400, "steps")


async def test_an_engine_that_hangs_or_ends_leaves_no_question_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.engine_client._TRACE_END_S", 0.01)
    monkeypatch.setattr("headrace.server.admin_api._DESCRIBE_S", 0.01)
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = generation(app)
            tasks.start_soon(stream.run)
            await app.until(lambda: app.client.engine_busy_since_s is not None)
            answer = await profile(app, timeout=0.01)
            assert (answer.status, answer.json()["error"]["message"]) == (500, "the engine does not answer")
            assert (await profile(app, timeout=0.01)).status == 409
            states = (await call(app.asgi, "GET", "/admin/requests")).json()
            assert not states["engine_answers"]
            assert [each["engine"] for each in states["requests"]] == [None]
            stacks = (await call(app.asgi, "GET", "/admin/stacks")).body.decode()
            assert "Thread headrace-engine" in stacks
        await stream.done.wait()
        await app.until(lambda: not app.client._questions)
        left = begin(app, "POST", "/admin/profile", {"timeout": LONG_S})
        tasks.start_soon(left.run)
        await anyio.wait_all_tasks_blocked()
        app.client._engine.stop()
        await left.done.wait()
        assert left.status == 504, "it had nothing to trace until its end"
        await app.client.stopped.wait()
        assert (await profile(app)).json()["error"]["code"] == "engine_dead"
        assert not (await call(app.asgi, "GET", "/admin/requests")).json()["engine_answers"]


async def test_every_request_is_told_of_and_no_word_of_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.admin_api._DESCRIBE_S", LONG_S)
    embedder = FakeOneShot("embedder", OneShotTask.EMBED, write_text_model(tmp_path))
    scheduler = make_scheduler(max_num_seqs=1)
    async with live_app(scheduler=scheduler, one_shots=[embedder]) as app, anyio.create_task_group() as tasks:
        streams = [generation(app), generation(app, n=2), generation(app, 3, prompt=SECRET_TEXT * 3)]
        with app.runner.held():
            for stream, num_all in zip(streams, (1, 3, 4), strict=True):
                tasks.start_soon(stream.run)
                await app.until(lambda num_all=num_all: app.client.num_unfinished == num_all)  # type: ignore[misc]
            await app.until(lambda: app.client.num_tokenizing == 0)
            app.runner.allow(4)
            await app.until(lambda: app.runner.num_begun == 5)
            answer = begin(app, "GET", "/admin/requests")
            tasks.start_soon(answer.run)
            await app.until(lambda: bool(app.client._questions))
            app.runner.allow(1)
            await answer.done.wait()
        for stream in streams:
            await stream.done.wait()
    assert SECRET_TEXT not in answer.body.decode()
    states = answer.json()
    assert states["engine_answers"]
    assert states["load"]["num_running"] == 1
    assert states["one_shot_models"] == [{"model": "embedder", "waiting": 0, "computing": 0}]
    assert states["num_tokenizing"] == 0
    running, *waiting = states["requests"]
    assert (running["phase"], running["prompt_tokens"]) == ("decode", len(SECRET_TEXT))
    assert running["completion_tokens"] == 5
    assert running["engine"] == {
        "is_running": True,
        "is_following": False,
        "num_tokens": len(SECRET_TEXT) + 5,
        "num_computed_tokens": len(SECRET_TEXT) + 4,
        "num_blocks": 1,
        "num_shared_blocks": 0,
        "num_preemptions": 0,
    }
    assert sorted((each["phase"], each["choice"], each["engine"]["is_running"]) for each in waiting) == [
        ("queued", 0, False),
        ("queued", 0, False),
        ("queued", 1, False),
    ]
    assert {each["tier"] for each in states["requests"]} == {"standard"}
    assert running["since_last_token_s"] <= running["age_s"]


def parts_that_watch(stacks: str) -> list[str]:
    return [part for part in stacks.split("\n\n") if "_cancel_on_disconnect" in part]


def num_watching(stacks: str) -> int:
    return sum(int(part.split()[0]) for part in parts_that_watch(stacks))


async def test_stacks_are_those_of_every_thread_and_task_and_hold_no_values() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            streams = [generation(app) for _ in range(3)]
            for stream in streams:
                tasks.start_soon(stream.run)
            await app.until(lambda: app.client.num_unfinished == 3)
            text = ""
            with anyio.fail_after(20):
                # Where a step is held, and the three and this request's own are watched.
                while "in FakeRunner.launch" not in text or num_watching(text) != 4:
                    text = (await call(app.asgi, "GET", "/admin/stacks")).body.decode()
        for stream in streams:
            await stream.done.wait()
    assert SECRET_TEXT not in text
    engine = text.split("Thread headrace-engine")[1].split("\n\n")[0]
    assert f"in {EngineCore.__qualname__}._step\n    step = self._launch(runner, output)" in engine
    assert "Thread MainThread" in text
    # Alike ones are told once, and this request's own may not have begun.
    assert len(parts_that_watch(text)) <= 2
    assert text.count("in App._sweep") == 1


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 200),
        ({"admin_port": 1}, 404),
        ({"host": "0.0.0.0"}, 404),
        ({"host": "::1"}, 200),
        ({"allowed_hosts": "chat.example.org"}, 404),  # whose proxy's clients come from anywhere
    ],
)
async def test_without_keys_it_is_for_this_machine_alone(settings: dict[str, Any], status: int) -> None:
    async with live_app(**settings) as app:
        for path in ("/admin/stacks", "/admin/requests"):
            assert (await call(app.asgi, "GET", path)).status == status
        assert (await profile(app, timeout=0.01)).status == (504 if status == 200 else 404)


@pytest.mark.parametrize("has_address", [False, True])
async def test_with_keys_it_is_at_the_operators_address_alone(tmp_path: Path, has_address: bool) -> None:
    secret, key = create_key("alice")
    append_key(tmp_path / "keys.toml", key)
    settings: dict[str, Any] = {"admin_port": 1} if has_address else {}
    async with live_app(api_keys_file=tmp_path / "keys.toml", **settings) as app:
        for method, path in (("POST", "/admin/profile"), ("GET", "/admin/stacks"), ("GET", "/admin/requests")):
            own = {"x-api-key": secret}
            assert (await call(app.asgi, method, path, {"timeout": 0.01}, headers=own)).status == 404
            answer = await call(app.admin, method, path, {"timeout": 0.01})
            assert answer.status == (504 if method == "POST" else 200)
