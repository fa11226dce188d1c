"""A request that is repeated with its key gets the answer that is there, or on its way, and costs nothing more."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text
from headrace.server.api_keys import append_key, create_key
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 6}  # sampled, so that a second generation would be another one
STREAM = BODY | {"stream": True}
KEY = {"idempotency-key": "stainless-python-retry-1234"}


async def ask(app: LiveApp, body: Any = BODY, path: str = "/v1/completions", **headers: str) -> Exchange:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await call(app.asgi, "POST", path, body, headers=KEY | sent)


def started(app: LiveApp, body: Any = STREAM, path: str = "/v1/completions") -> Exchange:
    request = exchange(app.asgi, "POST", path, headers=KEY)
    request.send_body(json.dumps(body).encode())
    return request


def num_chars(request: Exchange) -> int:
    """Of the text that has come."""
    frames = [event["data"] for event in request.events() if event["data"].startswith("{")]
    return sum(len(json.loads(frame)["choices"][0]["text"]) for frame in frames)


def is_replayed(answer: Exchange) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


HELLO = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": BODY,
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 6},
    "/v1/responses": {"input": "hi", "max_output_tokens": 6},
    "/v1/messages": {"messages": HELLO, "max_tokens": 6},
    "/api/chat": {"messages": HELLO, "options": {"num_predict": 6}},
    "/api/generate": {"prompt": "hi", "options": {"num_predict": 6}},
}


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_repeated_request_gets_the_same_bytes_and_is_not_computed_again(path: str, is_streamed: bool) -> None:
    body = ROUTES[path] | {"stream": is_streamed}
    async with live_app() as app:
        first = await ask(app, body, path)
        num_steps = app.runner.num_steps
        second = await ask(app, body, path, x_request_id="mine")
        assert app.runner.num_steps == num_steps
        other = await ask(app, body, path, idempotency_key="another")
    assert (first.status, second.status) == (200, 200)
    assert second.body == first.body
    own = dict.fromkeys(first.headers.keys() & {"x-request-id", "request-id"}, "mine")
    assert second.headers == first.headers | own | {"idempotent-replayed": "true"}
    assert not is_replayed(first)
    assert other.body != first.body


async def test_who_asks_while_the_answer_is_made_gets_it_from_its_beginning() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            first = started(app)
            tasks.start_soon(first.run)
            app.runner.allow(3)
            await first.wait_until(lambda: num_chars(first) == 3)
            second = started(app)
            tasks.start_soon(second.run)
            await second.wait_until(lambda: num_chars(second) == 3)
            assert second.body == first.body
        await first.done.wait()
        await second.done.wait()
    assert second.body == first.body
    assert num_chars(second) == app.runner.num_steps == 6


async def test_an_answer_goes_on_as_long_as_somebody_reads_it() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            first, second = started(app), started(app)
            tasks.start_soon(first.run)
            tasks.start_soon(second.run)
            app.runner.allow(2)
            await second.wait_until(lambda: num_chars(second) == 2)
            first.disconnect()
            await anyio.wait_all_tasks_blocked()
        await second.done.wait()
        await first.done.wait()
        assert second.body.endswith(b"data: [DONE]\n\n")
        assert (await ask(app, STREAM)).body == second.body


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "streamed"])
async def test_an_answer_that_all_its_readers_have_left_is_cancelled_and_its_key_is_free(body: dict[str, Any]) -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            readers = [started(app, body) for _ in range(3)]
            for reader in readers:
                tasks.start_soon(reader.run)
            app.runner.allow(2)
            await app.until(lambda: app.client.load.num_running == 1)
            for reader in readers:
                reader.disconnect()
            for reader in readers:
                await reader.done.wait()
            assert app.client.num_unfinished == 0
            again = started(app, body)
            tasks.start_soon(again.run)
        await again.done.wait()
        assert again.status == 200
        assert not is_replayed(again)


async def test_who_comes_back_at_the_very_moment_that_the_last_one_leaves_is_answered_anew() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            first = started(app)
            tasks.start_soon(first.run)
            await app.until(lambda: app.client.num_unfinished == 1)
            again = started(app)
            first.disconnect()
            tasks.start_soon(again.run)
        await again.done.wait()
        assert again.body.endswith(b"data: [DONE]\n\n")


async def test_a_slow_reader_holds_up_no_other() -> None:
    may_read = anyio.Event()

    async def wait(message: Any) -> None:
        await may_read.wait()

    async with live_app() as app, anyio.create_task_group() as tasks:
        slow = started(app)
        slow.reader = wait
        tasks.start_soon(slow.run)
        await app.until(lambda: app.client.num_unfinished == 0 and app.runner.num_steps == 6)
        fast = await ask(app, STREAM)
        assert is_replayed(fast)
        assert fast.body.endswith(b"data: [DONE]\n\n")
        may_read.set()
        await slow.done.wait()
        assert slow.body == fast.body


async def test_a_key_belongs_to_one_request() -> None:
    async with live_app() as app:
        await ask(app)
        for body, path in (
            (BODY | {"max_tokens": 7}, "/v1/completions"),
            (BODY, "/v1/streams"),
            (b"{", "/v1/completions"),
        ):
            refused = await ask(app, body, path)
            error = refused.json()["error"]
            assert (refused.status, error["code"], error["param"]) == (
                422,
                "idempotency_key_reused",
                "Idempotency-Key",
            )
        assert is_replayed(await ask(app))


async def test_a_key_belongs_to_its_tenant(tmp_path: Any) -> None:
    secrets = {}
    for name in ("alice", "bob"):
        secrets[name], key = create_key(name)
        append_key(tmp_path / "keys.toml", key)
    async with live_app(api_keys_file=tmp_path / "keys.toml") as app:
        answers = [await ask(app, x_api_key=secrets[name]) for name in ("alice", "bob", "alice")]
        assert [is_replayed(answer) for answer in answers] == [False, False, True]
        assert answers[0].body == answers[2].body != answers[1].body
        assert (await ask(app)).status == 401


@pytest.mark.parametrize("key", ["", " ", "two words", "x" * 256, "\u00e9", "a\tb"])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    async with live_app() as app:
        refused = await ask(app, idempotency_key=key)
        assert refused.status == 400
        assert refused.json()["error"]["param"] == "Idempotency-Key"
        assert app.runner.num_steps == 0


async def test_refusals_are_not_kept() -> None:
    async with live_app() as app:
        for wrong in (BODY | {"max_tokens": 0}, BODY | {"model": "other"}, b"{"):
            assert (await ask(app, wrong)).status in (400, 404)
        assert not is_replayed(await ask(app))


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ROUTES)
async def test_answers_that_failed_are_not_kept(path: str, is_streamed: bool) -> None:
    body = ROUTES[path] | {"stream": is_streamed}
    async with live_app() as app:
        app.runner.fail_next = True
        failed = await ask(app, body, path)
        again = await ask(app, body, path)
        assert not is_replayed(again)
        assert again.status == 200
        assert is_replayed(await ask(app, body, path))
    assert again.body != failed.body


async def test_a_native_stream_is_started_once() -> None:
    body = BODY | {"temperature": 0}
    async with live_app() as app:
        first, second = [await ask(app, body, "/v1/streams") for _ in range(2)]
        assert (first.status, second.status) == (201, 201)
        assert second.json() == first.json()
        assert second.headers["location"] == first.headers["location"]
        events = (await call(app.asgi, "GET", second.json()["events_url"])).events()
        tokens = [json.loads(event["data"])["text"] for event in events if event.get("event") == "token"]
        assert "".join(tokens) == expected_text("hello", 6)
        assert app.runner.num_steps == 6


async def test_where_nothing_is_generated_a_key_means_nothing() -> None:
    async with live_app() as app:
        for _ in range(2):
            assert not is_replayed(await ask(app, {"prompt": "a"}, "/tokenize"))
            assert not is_replayed(await call(app.asgi, "GET", "/v1/models", headers=KEY))


async def test_each_reader_has_its_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with live_app(runner=FakeRunner()) as app:
        for id in ("one", "two"):
            await ask(app, x_request_id=id)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "headrace.requests"]
    assert [(line["id"], line["finish_reason"]) for line in lines] == [("cmpl-one", "length"), ("two", "replayed")]
    assert KEY["idempotency-key"] not in str(lines)
