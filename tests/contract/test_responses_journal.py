"""Background responses that outlive their process, as clients meet them before and after it ends."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text
from killed_app import killed_app
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

NUM_TOKENS = 12
BODY: dict[str, Any] = {"input": "hi", "max_output_tokens": NUM_TOKENS, "temperature": 0, "background": True}
TEXT = expected_text("[user]hi\n[assistant]", NUM_TOKENS)
VARIETY: tuple[dict[str, Any], ...] = (
    {},
    {"stop": [TEXT[7:9]], "max_output_tokens": 40},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"instructions": "be kind", "metadata": {"a": "b"}, "temperature": 1.5, "seed": 7},
    {"tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}}], "tool_choice": "auto"},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "streams.db"


async def create(app: LiveApp, **fields: Any) -> str:
    answer = await call(app.asgi, "POST", "/v1/responses", BODY | fields)
    assert answer.status == 200, answer.body
    id: str = answer.json()["id"]
    return id


async def read(app: LiveApp, id: str, starting_after: int | None = None) -> Exchange:
    query = "stream=true" + ("" if starting_after is None else f"&starting_after={starting_after}")
    answer = await call(app.asgi, "GET", f"/v1/responses/{id}", query=query)
    assert answer.status == 200, answer.body
    return answer


def events_of(answer: Exchange) -> list[dict[str, Any]]:
    return [json.loads(event["data"]) for event in answer.events()]


def contents_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but what tells one response from another, and what the processes had in their caches."""
    id = events[0]["response"]["id"].removeprefix("resp_")
    found: list[dict[str, Any]] = json.loads(json.dumps(events).replace(id, "id"))
    for event in found:
        if (response := event.get("response")) is not None:
            del response["created_at"], response["completed_at"]
            if response["usage"] is not None:
                del response["usage"]["input_tokens_details"]
    return found


@pytest.mark.parametrize("num_steps", [0, 1, 3, 7, 11])
async def test_after_a_kill_at_any_step_events_are_those_of_an_uninterrupted_run(
    path: Path, tmp_path: Path, num_steps: int
) -> None:
    runners = [FakeRunner(max_context_tokens=1024) for _ in range(3)]
    async with live_app(runner=runners[0]) as app:
        expected = [contents_of(events_of(await read(app, await create(app, **fields)))) for fields in VARIETY]
    async with killed_app(path, tmp_path / "kill", 0, runner=runners[1]) as (app, second_path):
        ids = [await create(app, **fields) for fields in VARIETY]
        readers = [exchange(app.asgi, "GET", f"/v1/responses/{id}", query="stream=true") for id in ids]
        async with anyio.create_task_group() as tasks:
            for reader in readers:
                tasks.start_soon(reader.run)
            app.runner.allow(num_steps)
            await app.until(lambda: app.runner._num_allowed == 0)
            for reader in readers:
                await reader.wait_until(lambda reader=reader: b"response.in_progress" in reader.body)
                if not reader.done.is_set():
                    reader.disconnect()
    async with live_app(journal_file=second_path, runner=runners[2]) as app:
        for id, reader, events in zip(ids, readers, expected, strict=True):
            seen = events_of(reader)
            rest = events_of(await read(app, id, seen[-1]["sequence_number"]))
            assert contents_of(seen + rest) == events
            assert events_of(await read(app, id)) == seen + rest
            stored = (await call(app.asgi, "GET", f"/v1/responses/{id}")).json()
            assert stored == (seen + rest)[-1]["response"]


async def test_a_conversation_goes_on_after_a_restart(path: Path, tmp_path: Path) -> None:
    async with killed_app(path, tmp_path / "kill", 4) as (app, second_path):
        first = await create(app)
        await app.until(lambda: app.responses.get(first).generation.num_output_tokens > 0)
    async with live_app(journal_file=second_path) as app:
        await read(app, first)
        second = await create(app, input="and?", previous_response_id=first)
        await read(app, second)
        found = (await call(app.asgi, "GET", f"/v1/responses/{second}")).json()
        listed = (await call(app.asgi, "GET", f"/v1/responses/{second}/input_items", query="order=asc")).json()
    assert found["output"][0]["content"][0]["text"] == expected_text(
        f"[user]hi\n[assistant]{TEXT}\n[user]and?\n[assistant]", NUM_TOKENS
    )
    assert [item["content"][0]["text"] for item in listed["data"]] == ["hi", TEXT, "and?"]


async def test_a_drain_tells_readers_where_they_are_and_the_next_process_goes_on(path: Path) -> None:
    async with live_app(journal_file=path) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            id = await create(app)
            foreground = exchange(app.asgi, "POST", "/v1/responses")
            foreground.send_body(json.dumps(BODY | {"background": False}).encode())
            reader = exchange(app.asgi, "GET", f"/v1/responses/{id}", query="stream=true")
            for request in (foreground, reader):
                tasks.start_soon(request.run)
            await app.until(lambda: app.client.num_unfinished == 2)
            app.runner.allow(6)
            await reader.wait_until(lambda: b"output_text.delta" in reader.body)
            app.stop_accepting()
            app.end_unfinished()
            await reader.done.wait()
            await foreground.done.wait()
            status = (await call(app.asgi, "GET", f"/v1/responses/{id}")).json()["status"]
            deletion = await call(app.asgi, "DELETE", f"/v1/responses/{id}")
    *seen, error = events_of(reader)
    assert (error["type"], error["code"], error["sequence_number"]) == ("error", "draining", len(seen) - 1)
    assert status == "in_progress"
    assert (deletion.status, deletion.json()["error"]["resumable"]) == (503, True)
    assert (foreground.status, foreground.json()["error"]["resumable"]) == (503, False)
    async with live_app(journal_file=path) as app:
        rest = events_of(await read(app, id, error["sequence_number"]))
    assert [event["sequence_number"] for event in seen + rest] == list(range(len(seen + rest)))
    assert rest[-1]["response"]["output"][0]["content"][0]["text"] == TEXT


async def test_what_is_deleted_or_old_or_not_in_the_background_leaves_the_file(path: Path, tmp_path: Path) -> None:
    async with live_app(journal_file=path, response_ttl_s=100) as app:
        deleted, old = await create(app, input="secret one"), await create(app, input="secret two")
        await create(app, input="secret three", background=False)
        for id in (deleted, old):
            await read(app, id)
        await call(app.asgi, "DELETE", f"/v1/responses/{deleted}")
        app.responses.sweep(app.client.clock() + 100)
    assert b"secret" not in b"".join(file.read_bytes() for file in path.parent.iterdir())
    async with live_app(journal_file=path) as app:
        for id in (deleted, old):
            assert (await call(app.asgi, "GET", f"/v1/responses/{id}")).status == 404


async def test_until_the_journal_is_read_no_response_is_said_not_to_exist(path: Path) -> None:
    async with live_app(journal_file=path) as app:
        app.responses.is_whole = False
        for method in ("GET", "DELETE"):
            answer = await call(app.asgi, method, "/v1/responses/resp_x")
            assert (answer.status, answer.json()["error"]["code"]) == (503, "loading")
        answer = await call(app.asgi, "POST", "/v1/responses", BODY | {"previous_response_id": "resp_x"})
        assert answer.status == 503


async def test_a_response_that_this_version_cannot_read_is_gone_and_its_neighbours_are_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with killed_app(path, tmp_path / "kill", 0) as (app, second_path):
        bad = await create(app)
        app.responses.get(bad)
        with monkeypatch.context() as patch:
            patch.setattr(
                "headrace.server.responses_protocol.ResponseParams.model_dump", lambda *_, **__: {"top_k": -9}
            )
            other = await create(app, input="other")
        assert app.journal is not None
    async with live_app(journal_file=second_path) as app:
        assert (await call(app.asgi, "GET", f"/v1/responses/{other}")).status == 404
        assert events_of(await read(app, bad))[-1]["response"]["output"][0]["content"][0]["text"] == TEXT
