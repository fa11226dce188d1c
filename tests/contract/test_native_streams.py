"""Native streams, as an EventSource meets them."""

import json
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import expected_text, make_scheduler
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
NUM_TOKENS = 12
BODY = {"prompt": "river", "max_tokens": NUM_TOKENS, "temperature": 0}
TEXT = expected_text("river", NUM_TOKENS)


async def create(app: LiveApp, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", "/v1/streams", BODY | fields)
    assert answer.status == 201, answer.body
    created: dict[str, Any] = answer.json()
    assert answer.headers["location"] == created["url"]
    return created


async def read(app: LiveApp, stream: dict[str, Any], last_event_id: str | None = None, query: str = "") -> Exchange:
    headers = SSE if last_event_id is None else SSE | {"last-event-id": last_event_id}
    return await call(app.asgi, "GET", stream["events_url"], headers=headers, query=query)


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(json.loads(event["data"])["text"] for event in events if event.get("event") == "token")


async def test_a_stream_is_created_then_read_to_its_done_event() -> None:
    async with live_app() as app:
        stream = await create(app)
        assert len(stream["id"]) == 32
        answer = await read(app, stream)
    assert answer.status == 200
    events = answer.events()
    assert events[0] == {"retry": "1000"}
    named = events[1:]
    assert all(event["id"].startswith(f"{stream['id']}:") for event in named)
    assert {event["event"] for event in named} <= {"queued", "token", "done"}
    assert text_of(named) == TEXT
    tokens = [json.loads(event["data"]) for event in named if event["event"] == "token"]
    assert sum(token["num_tokens"] for token in tokens) == NUM_TOKENS
    # A reader cut between the last token and `done` comes back for `done`, so they have ids of their own.
    assert [event["id"] for event in named[-2:]] == [f"{stream['id']}:{NUM_TOKENS + i}" for i in (0, 1)]
    assert named[-1]["event"] == "done"
    done = json.loads(named[-1]["data"])
    assert done["finish_reason"] == "length"
    counts = done["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == (
        5,
        NUM_TOKENS,
        5 + NUM_TOKENS,
    )
    assert 0 <= done["timings"]["queue_s"] <= done["timings"]["ttft_s"] <= done["timings"]["total_s"]


async def test_messages_make_a_chat_stream() -> None:
    async with live_app() as app:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0, "stream": True}
        answer = await call(app.asgi, "POST", "/v1/streams", body)
        events = (await read(app, answer.json())).events()
    assert text_of(events) == expected_text("[user]hi\n[assistant]", 5)


@pytest.mark.parametrize("has_query", [True, False])
async def test_a_reader_that_comes_back_at_any_event_gets_exactly_the_rest(has_query: bool) -> None:
    async with live_app() as app:
        stream = await create(app)
        await read(app, stream)
        log = app.registry.get(stream["id"]).generation.log
        for cursor in range(NUM_TOKENS + 1):
            id = f"{stream['id']}:{cursor}"
            rest = await (read(app, stream, query=f"last_event_id={id}") if has_query else read(app, stream, id))
            assert rest.status == 200
            assert text_of(rest.events()) == TEXT[cursor:]
            assert rest.events()[-1]["event"] == "done"
        assert log.end == NUM_TOKENS + 1
        at_the_end = await read(app, stream, f"{stream['id']}:{log.end}")
        assert (at_the_end.status, at_the_end.body) == (204, b"")
        bare = await read(app, stream, str(NUM_TOKENS))
        assert bare.status == 200


async def test_each_reader_has_a_cursor_of_its_own() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = await create(app)
            readers = [exchange(app.asgi, "GET", stream["events_url"], headers=SSE) for _ in range(3)]
            for reader in readers:
                tasks.start_soon(reader.run)
            app.runner.allow(4)
            await readers[0].wait_until(lambda: b"event: token" in readers[0].body)
            readers[1].disconnect()
            await readers[1].done.wait()
        for reader in (readers[0], readers[2]):
            await reader.done.wait()
            assert text_of(reader.events()) == TEXT
        assert TEXT.startswith(text_of(readers[1].events()))
        seen = readers[1].events()[-1]["id"]
        assert text_of(readers[1].events()) + text_of((await read(app, stream, seen)).events()) == TEXT


@pytest.mark.parametrize("cursor", ["999", "-1", "1.5", "x", "", "1e3", "٣", "9" * 500])
async def test_a_cursor_that_is_none_of_this_streams_is_400(cursor: str) -> None:
    async with live_app() as app:
        stream = await create(app)
        answer = await read(app, stream, query=f"last_event_id={stream['id']}:{cursor}")
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "last_event_id"
        assert (await read(app, stream, f"{'0' * 32}:1")).status == 400


async def test_an_unknown_stream_is_404() -> None:
    async with live_app() as app:
        for method, path in (("GET", "/v1/streams/x"), ("GET", "/v1/streams/x/events"), ("DELETE", "/v1/streams/x")):
            assert (await call(app.asgi, method, path)).status == 404


async def test_an_evicted_stream_is_410() -> None:
    async with live_app(stream_ttl_s=0) as app:
        stream = await create(app)
        await read(app, stream)
        await app.until(lambda: stream["id"] not in app.registry._finished)
        answer = await read(app, stream)
        assert answer.status == 410
        assert answer.json()["error"]["code"] == "gone"


async def test_queued_tells_the_place_and_never_moves_the_cursor() -> None:
    async with live_app(scheduler=make_scheduler(max_num_seqs=1)) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            streams = [await create(app, prompt=f"q{i}") for i in range(3)]
            app.runner.allow(1)
            await app.until(lambda: app.client.num_waiting == 2)
            reader = exchange(app.asgi, "GET", streams[2]["events_url"], headers=SSE)
            tasks.start_soon(reader.run)
            await reader.wait_until(lambda: b"event: queued" in reader.body)
            queued = reader.events()[1]
            assert queued["id"] == f"{streams[2]['id']}:0"
            assert json.loads(queued["data"])["position"] == 2
            snapshot = await call(app.asgi, "GET", streams[2]["url"])
            assert snapshot.json()["status"] == "waiting"
        await reader.done.wait()
        assert text_of(reader.events()) == expected_text("q2", NUM_TOKENS)


async def test_get_stream_sends_its_id_before_any_token_and_resumes_instead_of_generating_again() -> None:
    query = f"prompt=river&max_tokens={NUM_TOKENS}&temperature=0"
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            first = exchange(app.asgi, "GET", "/v1/stream", query=query, headers=SSE)
            tasks.start_soon(first.run)
            await first.wait_until(lambda: b"event: queued" in first.body)
            id = first.events()[1]["id"]
            first.disconnect()
            await first.done.wait()
        again = await call(app.asgi, "GET", "/v1/stream", query=query, headers=SSE | {"last-event-id": id})
        assert text_of(again.events()) == TEXT
        assert b"headrace_prompt_tokens_total 5.0" in app.client.metrics.expose(), "generated once"
        end = again.events()[-1]["id"]
        over = await call(app.asgi, "GET", "/v1/stream", query=query, headers=SSE | {"last-event-id": end})
        assert over.status == 204


async def test_get_stream_wants_to_be_asked_for_an_event_stream() -> None:
    async with live_app() as app:
        for accept in ("*/*", "text/html,image/png", ""):
            answer = await call(app.asgi, "GET", "/v1/stream", query="prompt=x", headers={"accept": accept})
            assert answer.status == 406
        wrong = await call(app.asgi, "GET", "/v1/stream", query="prompt=x&max_tokens=many", headers=SSE)
        assert wrong.status == 400
        assert wrong.json()["error"]["param"] == "max_tokens"
        assert (await call(app.asgi, "GET", "/v1/stream", headers=SSE)).status == 400


async def test_under_overload_an_eventsource_is_told_to_come_back_and_a_post_gets_429() -> None:
    async with live_app(max_queue_size=1, scheduler=make_scheduler(max_num_seqs=1)) as app:
        with app.runner.held():
            await create(app)
            app.runner.allow(1)
            await app.until(lambda: app.client.num_waiting == 0)
            await create(app)
            later = await call(app.asgi, "GET", "/v1/stream", query="prompt=x", headers=SSE)
            assert later.status == 200
            [event] = later.events()
            assert int(event["retry"]) >= 750
            assert (await call(app.asgi, "POST", "/v1/streams", BODY)).status == 429


async def test_while_draining_an_eventsource_is_told_to_come_back() -> None:
    async with live_app() as app:
        app.stop_accepting()
        later = await call(app.asgi, "GET", "/v1/stream", query="prompt=x", headers=SSE)
        assert later.status == 200
        assert list(later.events()[0]) == ["retry"]
        assert (await call(app.asgi, "POST", "/v1/streams", BODY)).status == 503


@pytest.mark.parametrize("on_disconnect", ["cancel", "continue", None])
async def test_a_stream_without_readers_ends_after_its_grace_time_unless_asked_to_continue(
    on_disconnect: str | None,
) -> None:
    async with live_app(stream_grace_s=0.1) as app:
        with app.runner.held():
            stream = await create(app, on_disconnect=on_disconnect)
            native = app.registry.get(stream["id"])
            await anyio.sleep(0.6)  # longer than the grace time and a sweep
            assert native.generation.is_over == (on_disconnect != "continue")
        snapshot = await call(app.asgi, "GET", stream["url"])
        if on_disconnect == "continue":
            assert text_of((await read(app, stream)).events()) == TEXT
        else:
            assert snapshot.json()["finish_reason"] == "cancelled"


@pytest.mark.parametrize(("server_grace_s", "asked_s"), [(0, 60), (60, 0)])
async def test_a_stream_may_ask_for_a_grace_time_of_its_own(server_grace_s: float, asked_s: float) -> None:
    async with live_app(stream_grace_s=server_grace_s) as app:
        with app.runner.held():
            stream = await create(app, disconnect_grace_s=asked_s)
            native = app.registry.get(stream["id"])
            await anyio.sleep(0.6)  # longer than a sweep
            assert native.generation.is_over == (asked_s == 0)
        for wrong in (-1, 1e9, "long"):
            answer = await call(app.asgi, "POST", "/v1/streams", BODY | {"disconnect_grace_s": wrong})
            assert answer.status == 400
            assert answer.json()["error"]["param"] == "disconnect_grace_s"


async def test_a_reader_within_the_grace_time_keeps_the_stream() -> None:
    async with live_app(stream_grace_s=0.4) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = await create(app)
            reader = exchange(app.asgi, "GET", stream["events_url"], headers=SSE)
            tasks.start_soon(reader.run)
            await anyio.sleep(1.0)
        await reader.done.wait()
        assert text_of(reader.events()) == TEXT


async def test_delete_ends_the_stream_for_its_readers_and_can_be_repeated() -> None:
    async with live_app() as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = await create(app)
            reader = exchange(app.asgi, "GET", stream["events_url"], headers=SSE)
            tasks.start_soon(reader.run)
            app.runner.allow(3)
            await reader.wait_until(lambda: b"event: token" in reader.body)
            deleted = await call(app.asgi, "DELETE", stream["url"])
            await reader.done.wait()
        done = json.loads(reader.events()[-1]["data"])
        assert done["finish_reason"] == "cancelled"
        assert deleted.json()["status"] == "finished"
        again = await call(app.asgi, "DELETE", stream["url"])
        assert again.json() == deleted.json()
        assert TEXT.startswith(again.json()["text"])


async def test_a_snapshot_says_what_there_is() -> None:
    async with live_app() as app:
        stream = await create(app)
        await read(app, stream)
        snapshot = (await call(app.asgi, "GET", stream["url"])).json()
    assert snapshot["text"] == TEXT
    assert snapshot["cursor"] == NUM_TOKENS + 1
    assert snapshot["status"] == "finished"
    assert snapshot["error"] is None
    assert snapshot["id"] == stream["id"]


async def test_a_stream_whose_step_fails_gets_an_error_event() -> None:
    async with live_app() as app:
        app.runner.fail_next = True
        stream = await create(app)
        events = (await read(app, stream)).events()
        assert events[-1]["event"] == "error"
        assert json.loads(events[-1]["data"])["error"]["code"] == "engine_error"
        assert (await read(app, stream, events[-1]["id"])).status == 204


async def test_null_and_unknown_parameters_are_absent() -> None:
    async with live_app() as app:
        await read(app, await create(app, messages=None))
        opened = await call(app.asgi, "GET", "/v1/stream", query="prompt=river&temperature=0&_=a1b2", headers=SSE)
        assert text_of(opened.events()) == expected_text("river", 16)
        wrong_method = await call(app.asgi, "PUT", "/v1/streams/x")
        assert {"GET", "DELETE"} <= set(wrong_method.headers["allow"].split(", "))


@pytest.mark.parametrize("fields", [{"prompt": "a", "messages": []}, {}, {"prompt": "a", "on_disconnect": "explode"}])
async def test_a_wrong_body_starts_no_stream(fields: dict[str, Any]) -> None:
    async with live_app() as app:
        answer = await call(app.asgi, "POST", "/v1/streams", fields)
        assert answer.status == 400
        assert app.client.num_unfinished == 0


async def test_neither_the_logged_id_nor_the_request_id_reads_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with live_app() as app:
        created = await call(app.asgi, "POST", "/v1/streams", BODY | {"prompt": "secret prompt"})
        await read(app, created.json())
    assert created.headers["x-request-id"] != created.json()["id"]
    [line] = [record.getMessage() for record in caplog.records if record.name == "headrace.requests"]
    assert created.json()["id"] not in line
    assert "secret" not in line
    logged = json.loads(line)
    stages = logged["stages_ms"]
    order = ["tokenized", "submitted", "scheduled", "first_token", "end"]
    assert [stages[name] for name in order] == sorted(stages[name] for name in order)
    assert set(stages) == {*order, "first_byte", "last_token"}
