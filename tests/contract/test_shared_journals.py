"""Replicas that share a folder of journals: each reads what another makes, and goes on with what one has left."""

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text
from headrace.server.api_keys import append_key, create_key
from headrace.server.generation import Generation
from headrace.server.journal import Journal, JournalError
from headrace.server.journal_folder import JournalFolder
from killed_app import app_until
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
NUM_TOKENS = 12
BODY = {"prompt": "river", "max_tokens": NUM_TOKENS, "temperature": 0}
TEXT = expected_text("river", NUM_TOKENS)
ADAPTERS = {"poet": "of words"}
RESPONSE = {"input": "hi", "max_output_tokens": NUM_TOKENS, "temperature": 0, "background": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("headrace.server.shared_journals._POLL_S", 0.005)
    return tmp_path / "journals"


@asynccontextmanager
async def replica(name: str, folder: Path, **settings: Any) -> AsyncIterator[LiveApp]:
    async with live_app(replica_name=name, journal_dir=folder, **settings) as app:
        yield app


@asynccontextmanager
async def dead_replica(name: str, folder: Path, copy: Path, num_steps: int, **settings: Any) -> AsyncIterator[LiveApp]:
    """One whose runner makes so many steps; when the block is left `copy` is the folder as a kill would leave it."""
    kill = partial(shutil.copytree, folder, copy)
    settings |= {"replica_name": name, "journal_dir": folder}
    async with app_until(kill, num_steps, runner=FakeRunner(), **settings) as app:
        yield app


async def create(app: LiveApp, **fields: Any) -> str:
    answer = await call(app.asgi, "POST", "/v1/streams", BODY | fields)
    assert answer.status == 201, answer.body
    id: str = answer.json()["id"]
    return id


async def read(app: LiveApp, id: str, last_event_id: str | None = None) -> Exchange:
    headers = SSE if last_event_id is None else SSE | {"last-event-id": last_event_id}
    return await call(app.asgi, "GET", f"/v1/streams/{id}/events", headers=headers)


def generation_of(app: LiveApp, id: str) -> Generation:
    return app.registry.get(id).generation


async def until_said(app: LiveApp, id: str, num_tokens: int) -> None:
    await app.until(lambda: generation_of(app, id).num_output_tokens >= num_tokens)


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(json.loads(event["data"])["text"] for event in events if event.get("event") == "token")


def ends_of(events: list[dict[str, str]]) -> list[str]:
    return [event["event"] for event in events if event.get("event") not in (None, "queued", "token")]


def contents_of(events: list[dict[str, str]]) -> dict[str, Any]:
    """All but what depends on when a reader came, and on which clock."""
    done = json.loads(events[-1]["data"])
    del done["timings"], done["usage"]["prompt_tokens_details"]
    tokens = [json.loads(event["data"]) for event in events if event.get("event") == "token"]
    logprobs = [item for token in tokens for item in token.get("logprobs", [])]
    return {"text": text_of(events), "ends": ends_of(events), "logprobs": logprobs, "done": done}


@asynccontextmanager
async def following(app: LiveApp, id: str) -> AsyncIterator[Exchange]:
    """A reader, under way until the block is left."""
    reader = exchange(app.asgi, "GET", f"/v1/streams/{id}/events", headers=SSE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.run)
        await app.until(lambda: reader.status is not None)
        yield reader
        if not reader.done.is_set():
            reader.disconnect()


async def test_what_a_replica_has_finished_another_one_tells_event_for_event(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        id = await create(alpha, logprobs=1, stop=[TEXT[8:10]])
        own = (await read(alpha, id)).events()
        told = (await read(beta, id)).events()
        assert contents_of(told) == contents_of(own)
        assert told[-1]["id"] == own[-1]["id"]
        for event in own:
            if "id" in event and event is not own[-1]:
                own_rest, told_rest = [(await read(app, id, event["id"])).events() for app in (alpha, beta)]
                assert text_of(own_rest) == text_of(told_rest)
                assert ends_of(told_rest) == ["done"]
        assert (await read(beta, id, own[-1]["id"])).status == 204
        assert (await read(beta, id, f"{id}:99")).status == 400
        snapshots = [(await call(app.asgi, "GET", f"/v1/streams/{id}")).json() for app in (alpha, beta)]
        assert [each["text"] for each in snapshots] == [TEXT[:8]] * 2
        assert snapshots[0]["last_event_id"] == snapshots[1]["last_event_id"]
        assert beta.runner.num_steps == 0


async def test_what_a_replica_still_makes_another_one_tells_as_it_comes(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            id = await create(alpha)
            async with following(beta, id) as reader:
                alpha.runner.allow(4)
                await reader.wait_until(lambda: text_of(reader.events()) == TEXT[:4])
                late = exchange(beta.asgi, "GET", "/v1/stream", headers=SSE | {"last-event-id": f"{id}:2"})
                alpha.runner.allow(NUM_TOKENS)
                await reader.done.wait()
                await late.run()
        assert (text_of(reader.events()), ends_of(reader.events())) == (TEXT, ["done"])
        assert (text_of(late.events()), ends_of(late.events())) == (TEXT[2:], ["done"])
        assert beta.runner.num_steps == 0


async def test_who_was_at_its_owner_a_moment_ago_finds_all_that_it_has_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.shared_journals._POLL_S", 600)  # what is followed lags behind
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            id = await create(alpha)
            path = f"/v1/responses/{(await call(alpha.asgi, 'POST', '/v1/responses', RESPONSE)).json()['id']}"
            for each in (f"/v1/streams/{id}", path):
                assert (await call(beta.asgi, "GET", each)).status == 200
            async with following(alpha, id) as reader:
                alpha.runner.allow(5)
                await reader.wait_until(lambda: text_of(reader.events()) == TEXT[:5])
                last = reader.events()[-1]["id"]
            headers = SSE | {"last-event-id": last}
            again = exchange(beta.asgi, "GET", f"/v1/streams/{id}/events", headers=headers)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(again.run)
                await again.wait_until(lambda: again.status is not None)
                assert again.status == 200
                again.disconnect()
            alpha.runner.allow(100)
            whole = (await call(alpha.asgi, "GET", path, query="stream=true")).events()
        rest = await call(beta.asgi, "GET", path, query=f"stream=true&starting_after={len(whole) - 2}")
        assert [event["event"] for event in rest.events()] == ["response.incomplete"]
        more = RESPONSE | {"input": "and?", "previous_response_id": path.rpartition("/")[2]}
        assert (await call(beta.asgi, "POST", "/v1/responses", more)).status == 200


async def test_only_its_owner_ends_a_stream_and_others_say_who_that_is(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder, peers='{"alpha": "http://a"}') as beta:
        with alpha.runner.held():
            id = await create(alpha)
            for _ in range(2):
                answer = await call(beta.asgi, "DELETE", f"/v1/streams/{id}")
                error = answer.json()["error"]
                assert (answer.status, error["replica"], error["url"]) == (421, "alpha", "http://a")
            assert not generation_of(alpha, id).is_over
            async with following(beta, id) as reader:
                await call(alpha.asgi, "DELETE", f"/v1/streams/{id}")
                await reader.done.wait()
        assert json.loads(reader.events()[-1]["data"])["finish_reason"] == "cancelled"


@pytest.mark.parametrize("num_steps", [0, 1, 5, 11])
async def test_what_a_replica_that_died_has_left_another_one_goes_on_with(
    folder: Path, tmp_path: Path, num_steps: int
) -> None:
    variety: tuple[dict[str, Any], ...] = (
        {},
        {"stop": [TEXT[7:9]], "max_tokens": 30},
        {"logprobs": 2, "seed": 7, "temperature": 1.5},
        {"echo": True, "logprobs": 1},
        {"prompt": "a long prompt that takes several steps " * 6, "echo": True, "logprobs": 1},
    )
    async with live_app() as app:
        expected = [contents_of((await read(app, await create(app, **fields))).events()) for fields in variety]
    async with dead_replica("alpha", folder, tmp_path / "left", 0) as alpha:
        ids = [await create(alpha, **fields) for fields in variety]
        alpha.runner.allow(num_steps)
        await alpha.until(lambda: alpha.runner._num_allowed == 0)
    async with replica("beta", tmp_path / "left") as beta:
        assert [contents_of((await read(beta, id)).events()) for id in ids] == expected
        for id in ids:
            assert (await call(beta.asgi, "DELETE", f"/v1/streams/{id}")).status == 200, "it is beta's now"


async def test_a_reader_that_follows_does_not_notice_that_another_replica_takes_over(folder: Path) -> None:
    async with replica("beta", folder) as beta, anyio.create_task_group() as tasks:
        async with replica("alpha", folder) as alpha:
            with alpha.runner.held():
                ids = [await create(alpha), await create(alpha, prompt="mill", on_disconnect="continue")]
                reader = exchange(beta.asgi, "GET", f"/v1/streams/{ids[0]}/events", headers=SSE)
                tasks.start_soon(reader.run)
                alpha.runner.allow(5)
                await reader.wait_until(lambda: text_of(reader.events()) == TEXT[:5])
                own = generation_of(beta, ids[0])
                alpha.end_unfinished()
        await reader.done.wait()
        assert (text_of(reader.events()), ends_of(reader.events())) == (TEXT, ["done"])
        assert generation_of(beta, ids[0]) is own
        assert reader.events()[-1]["id"] == f"{ids[0]}:{NUM_TOKENS + 1}-1"
        assert text_of((await read(beta, ids[1])).events()) == expected_text("mill", NUM_TOKENS)


async def test_of_two_that_are_asked_at_once_one_goes_on_and_the_other_follows(folder: Path, tmp_path: Path) -> None:
    async with dead_replica("alpha", folder, tmp_path / "left", 5) as alpha:
        id = await create(alpha)
        await until_said(alpha, id, 5)
    async with replica("beta", tmp_path / "left") as beta, replica("gamma", tmp_path / "left") as gamma:
        readers = [exchange(app.asgi, "GET", f"/v1/streams/{id}/events", headers=SSE) for app in (beta, gamma) * 3]
        async with anyio.create_task_group() as tasks:
            for reader in readers:
                tasks.start_soon(reader.run)
        for reader in readers:
            assert (text_of(reader.events()), ends_of(reader.events())) == (TEXT, ["done"])
        assert sorted([beta.runner.num_steps, gamma.runner.num_steps]) == [0, NUM_TOKENS - 5]
        assert len({reader.events()[-1]["id"] for reader in readers}) == 1


async def test_a_replica_that_comes_back_follows_what_another_one_has_taken_over(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    async with dead_replica("alpha", folder, left, 5) as alpha:
        id, other = await create(alpha), await create(alpha, prompt="mill")
        await until_said(alpha, id, 5)
    async with replica("beta", left) as beta:
        with beta.runner.held():
            async with following(beta, id) as reader, replica("alpha", left) as alpha:
                new = await create(alpha, prompt="new")
                for app in (alpha, beta):
                    assert text_of((await read(app, new)).events()) == expected_text("new", NUM_TOKENS)
                answer = await call(alpha.asgi, "DELETE", f"/v1/streams/{other}")
                assert (answer.status, answer.json()["error"]["replica"]) == (421, "beta")
                async with following(alpha, id) as again:
                    beta.runner.allow(100)
                    await again.done.wait()
                await reader.done.wait()
        assert text_of(reader.events()) == text_of(again.events()) == TEXT
        assert reader.events()[-1]["id"] == again.events()[-1]["id"]


async def test_a_replica_takes_over_all_that_its_earlier_processes_have_left(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    async with dead_replica("alpha", folder, left, 0) as alpha:
        first = await create(alpha)
    async with replica("beta", left) as beta:
        with beta.runner.held():
            assert (await call(beta.asgi, "GET", f"/v1/streams/{first}")).status == 200
            async with replica("alpha", left) as alpha:
                with alpha.runner.held():
                    second = await create(alpha, prompt="mill")
    async with replica("alpha", left) as alpha:
        for id, prompt in ((first, "river"), (second, "mill")):
            await alpha.until(lambda id=id: generation_of(alpha, id).is_over)  # type: ignore[misc]
            assert generation_of(alpha, id).log.read().text == expected_text(prompt, NUM_TOKENS)


async def test_who_reads_at_another_replica_keeps_a_stream_from_being_cancelled(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            read_there, unread = await create(alpha), await create(alpha)

            def sweep() -> None:
                alpha.registry.sweep(alpha.client.clock() + 100)

            async with following(beta, read_there):
                await beta.until(lambda: alpha.registry.get(read_there).is_read_elsewhere)
                sweep()
                assert not generation_of(alpha, read_there).is_cancelled
                assert generation_of(alpha, unread).is_cancelled
                alpha.registry.get(read_there).unread_since_s = 0
            await beta.until(lambda: not alpha.registry.get(read_there).is_read_elsewhere)
            sweep()
            assert generation_of(alpha, read_there).is_cancelled


async def test_no_other_id_shows_a_streams_events(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        ids = {"alpha": await create(alpha), "beta": await create(beta)}
        for id in ids.values():
            assert (await read(alpha, id)).status == (await read(beta, id)).status == 200
        forged = [ids["alpha"].replace("alpha", "beta"), ids["beta"].replace("beta", "alpha"), ids["alpha"][6:]]
        strange = ["alpha-" + "0" * 32, "gamma-" + "0" * 32, "..-" + "0" * 32, "sqlite_schema", 'x"; DROP TABLE y; --']
        for app in (alpha, beta):
            for id in (*forged, *strange):
                assert (await read(app, id)).status == 404
                assert (await call(app.asgi, "GET", f"/v1/responses/resp_{id}")).status == 404


async def test_a_stream_of_another_model_or_tenant_is_none_here_and_is_left_to_its_owner(
    folder: Path, tmp_path: Path
) -> None:
    headers, keys = {}, {name: tmp_path / f"{name}.toml" for name in ("both", "one")}
    for name in ("alice", "bob"):
        secret, key = create_key(name)
        headers[name] = {"authorization": f"Bearer {secret}"}
        for file in keys.values() if name == "alice" else [keys["both"]]:
            append_key(file, key)
    async with replica("alpha", folder, api_keys_file=keys["both"]) as alpha:
        ids = {}
        for name in headers:
            answer = await call(alpha.asgi, "POST", "/v1/streams", BODY, headers=headers[name])
            ids[name] = answer.json()["id"]
            await read(alpha, ids[name])
        async with replica("beta", folder, api_keys_file=keys["one"]) as beta:
            for name, status in (("alice", 200), ("bob", 404)):
                path = f"/v1/streams/{ids[name]}"
                assert (await call(beta.asgi, "GET", path, headers=headers["alice"])).status == status
            assert (await read(beta, ids["bob"])).status == 404
        async with replica("beta", folder, api_keys_file=keys["both"]) as beta:
            beta._shared._model = "another"  # type: ignore[union-attr]
            assert (await read(beta, ids["alice"])).status == 404
            beta._shared._model = "fake "  # type: ignore[union-attr]
            path = f"/v1/streams/{ids['alice']}"
            assert [(await call(beta.asgi, "GET", path, headers=each)).status for each in headers.values()] == [
                200,
                404,
            ]
            assert (await call(beta.asgi, "DELETE", path, headers=headers["bob"])).status == 404


async def test_background_responses_are_read_anywhere_and_go_on(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    async with replica("beta", folder) as app:
        id = (await call(app.asgi, "POST", "/v1/responses", RESPONSE)).json()["id"]
        whole = (await call(app.asgi, "GET", f"/v1/responses/{id}", query="stream=true")).events()
    async with dead_replica("alpha", folder, left, 4) as alpha:
        id = (await call(alpha.asgi, "POST", "/v1/responses", RESPONSE)).json()["id"]
        await alpha.until(lambda: alpha.responses.get(id).generation.num_output_tokens == 4)
        async with replica("gamma", folder) as gamma:
            begun = (await call(gamma.asgi, "GET", f"/v1/responses/{id}")).json()
            assert begun["status"] == "in_progress"
            assert (await call(gamma.asgi, "POST", f"/v1/responses/{id}/cancel")).status == 421
            assert (await call(gamma.asgi, "DELETE", f"/v1/responses/{id}")).status == 421
    async with replica("beta", left) as beta:
        rest = (await call(beta.asgi, "GET", f"/v1/responses/{id}", query="stream=true&starting_after=3")).events()
        numbers = [json.loads(event["data"])["sequence_number"] for event in rest]
        assert numbers == list(range(4, len(whole)))
        assert [event["event"] for event in rest] == [event["event"] for event in whole[4:]]
        more = RESPONSE | {"input": "and?", "previous_response_id": id, "background": False}
        async with replica("gamma", left) as gamma:
            answer = (await call(gamma.asgi, "POST", "/v1/responses", more)).json()
        text = json.loads(rest[-1]["data"])["response"]["output"][0]["content"][0]["text"]
        prompt = f"[user]hi\n[assistant]{text}\n[user]and?\n[assistant]"
        assert answer["output"][0]["content"][0]["text"] == expected_text(prompt, NUM_TOKENS)


async def test_where_a_replica_ends_its_readers_of_others_streams_come_back_to_another(folder: Path) -> None:
    async with replica("alpha", folder) as alpha:
        with alpha.runner.held():
            id = await create(alpha)
            alpha.runner.allow(5)
            async with replica("beta", folder) as beta, following(beta, id) as reader:
                await reader.wait_until(lambda: text_of(reader.events()) == TEXT[:5])
                beta.stop_accepting()
                beta.end_unfinished()
                await reader.done.wait()
                assert ends_of(reader.events()) == ["interrupted"]
                retry = (await read(beta, await create(alpha))).events()
                assert [list(event) for event in retry] == [["retry"]], "who comes now is sent on"
            alpha.runner.allow(100)
            rest = (await read(alpha, id, reader.events()[-1]["id"])).events()
    assert text_of(reader.events()) + text_of(rest) == TEXT


async def test_where_a_stream_is_kept_no_longer_its_readers_elsewhere_are_told(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            id = await create(alpha)
            async with following(beta, id) as reader:
                assert alpha.journal is not None
                alpha.journal.erase(id)
                await reader.done.wait()
        assert ends_of(reader.events()) == ["error"]
        assert json.loads(reader.events()[-1]["data"])["error"]["code"] == "gone"
        assert (await read(beta, id)).status == 404


async def test_a_stream_is_followed_no_longer_than_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.server.shared_journals._KEPT_S", 0.02)
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        id = await create(alpha)
        await read(beta, id)
        await beta.until(lambda: id not in beta.registry)
        assert text_of((await read(beta, id)).events()) == TEXT


async def test_what_was_taken_over_is_let_go_of_once_it_is_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.journal._ERASED_WITHIN_S", 0.01)
    left = tmp_path / "left"
    async with dead_replica("alpha", folder, left, 5) as alpha:
        id = await create(alpha, prompt="secret")
    async with replica("beta", left) as beta:
        async with following(beta, id) as reader:
            await reader.done.wait()
        assert len(beta.client.journals) == 2
        beta.registry.forget(beta.registry.get(id))
        await beta.until(lambda: not (left / "alpha").exists())
        assert len(beta.client.journals) == 1
        assert (await read(beta, id)).status == 410
        async with replica("alpha", left):
            assert [path.name for path in (left / "alpha").glob("*.db")] == ["1.db"], "it has its file again"
    files = [path for path in left.rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() or id in path.name for path in files)
    assert all(path.stat().st_mode & 0o077 == 0 for path in left.rglob("*"))


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (lambda folder: (folder / "alpha" / "1.lock").write_bytes(b"\xff"), 421),
        (lambda folder: (folder / "alpha" / "1.lock").write_bytes(b""), 421),
        (lambda folder: shutil.rmtree(folder), 404),
    ],
    ids=["a name that is none", "no name", "no folder"],
)
async def test_whose_a_followed_stream_is_can_be_told_without_the_folder_or_it_is_gone(
    folder: Path, spoil: Callable[[Path], object], status: int
) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            id = await create(alpha)
            assert (await call(beta.asgi, "GET", f"/v1/streams/{id}")).status == 200
            spoil(folder)
            answer = await call(beta.asgi, "DELETE", f"/v1/streams/{id}")
            assert (answer.status, answer.json()["error"].get("replica", "alpha")) == (status, "alpha")


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), PermissionError()], ids=type)
@pytest.mark.parametrize("is_followed", [False, True])
async def test_what_cannot_be_read_for_now_may_be_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_followed: bool
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        id = await create(alpha)
        await read(alpha, id)
        if is_followed:
            assert (await call(beta.asgi, "GET", f"/v1/streams/{id}")).status == 200
        with monkeypatch.context() as patches:
            for module in ("journal_folder", "shared_journals"):
                patches.setattr(f"headrace.server.{module}.read_rows", fail)
            refused = await call(beta.asgi, "GET", f"/v1/streams/{id}")
            assert (refused.status, refused.json()["error"]["code"]) == (503, "journal_busy")
            assert int(refused.headers["retry-after"]) >= 1
            assert [list(event) for event in (await read(beta, id)).events()] == [["retry"]]
        assert text_of((await read(beta, id)).events()) == TEXT


async def test_all_that_is_left_is_taken_over_unasked_and_its_files_go_with_their_streams(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.app._SWEEP_INTERVAL_S", 0.01)
    left = tmp_path / "left"
    async with dead_replica("alpha", folder, left, 5) as alpha:
        id = await create(alpha, on_disconnect="continue")
        await until_said(alpha, id, 5)
    async with replica("gamma", left) as gamma:
        finished = await create(gamma)
        await read(gamma, finished)
    async with replica("beta", left) as beta, replica("delta", left) as delta:
        await beta.take_over_left()
        await delta.take_over_left()
        assert (len(beta.client.journals), len(delta.client.journals)) == (3, 1)
        await beta.until(lambda: generation_of(beta, id).is_over)
        assert generation_of(beta, id).log.read().text == text_of((await read(delta, finished)).events()) == TEXT
        for each in (id, finished):
            beta.registry.forget(beta.registry.get(each))
        await beta.until(lambda: sorted(path.name for path in left.iterdir()) == ["beta", "delta"])
        assert len(beta.client.journals) == 1
        assert (await read(beta, id)).status == 410


async def left_by_alpha(tmp_path: Path) -> tuple[Path, dict[str, Path], dict[str, str], dict[str, str]]:
    """What it has left: a stream of bob's, one of an adapter's, and one that is for anybody who knows alice, whose
    headers come last."""
    left, headers, keys = tmp_path / "left", {}, {name: tmp_path / f"{name}.toml" for name in ("both", "one")}
    for name in ("alice", "bob"):
        secret, key = create_key(name)
        headers[name] = {"authorization": f"Bearer {secret}"}
        for file in keys.values() if name == "alice" else [keys["both"]]:
            append_key(file, key)
    settings: dict[str, Any] = {"api_keys_file": keys["both"], "adapters": ADAPTERS}
    async with dead_replica("alpha", tmp_path / "journals", left, 0, **settings) as alpha:
        ids = {}
        for what, name, fields in (("alice", "alice", {}), ("bob", "bob", {}), ("poet", "alice", {"model": "poet"})):
            body = BODY | {"on_disconnect": "continue"} | fields
            answer = await call(alpha.asgi, "POST", "/v1/streams", body, headers=headers[name])
            ids[what] = answer.json()["id"]
        alpha.runner.allow(5)
        for id in ids.values():
            await until_said(alpha, id, 1)
    return left, keys, ids, headers["alice"]


async def test_what_is_not_for_who_takes_a_file_over_is_left_to_who_can_go_on_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.app._SWEEP_INTERVAL_S", 0.01)
    left, keys, ids, alice = await left_by_alpha(tmp_path)
    async with replica("delta", left, api_keys_file=keys["both"]) as delta:
        assert delta._shared is not None
        delta._shared._model = "another"
        await delta.take_over_left()
        assert len(delta.client.journals) == 2
        await delta.until(lambda: len(delta.client.journals) == 1)
        await delta.take_over_left()
        assert len(delta.client.journals) == 1, "it knows that nothing there is its own"
    async with (
        replica("beta", left, api_keys_file=keys["one"]) as beta,
        replica("gamma", left, api_keys_file=keys["both"], adapters=ADAPTERS) as gamma,
    ):
        await beta.take_over_left()
        await beta.until(lambda: generation_of(beta, ids["alice"]).is_over)
        async with following(beta, ids["poet"]) as reader:
            assert (await read(beta, ids["bob"])).status == 404
            refused = await call(beta.asgi, "DELETE", f"/v1/streams/{ids['poet']}", headers=alice)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "journal_busy")
            await gamma.take_over_left()
            assert len(gamma.client.journals) == 1, "beta holds the file"
            beta.registry.forget(beta.registry.get(ids["alice"]))
            await beta.until(lambda: len(beta.client.journals) == 1)
            assert text_of((await read(gamma, ids["bob"])).events()) == TEXT
            await reader.done.wait()
        assert (ends_of(reader.events()), ids["poet"] in gamma.registry) == (["done"], True)
        assert text_of(reader.events()) == expected_text("river", NUM_TOKENS, adapter="poet")
        assert beta.runner.num_steps < NUM_TOKENS, "the rest was gamma's"


async def test_what_is_left_to_others_is_erased_once_it_would_be_kept_no_longer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.app._SWEEP_INTERVAL_S", 0.01)
    left, keys, ids, _ = await left_by_alpha(tmp_path)
    async with replica("beta", left, api_keys_file=keys["one"], stream_ttl_s=0) as beta:
        await beta.take_over_left()
        await beta.until(lambda: sorted(path.name for path in left.iterdir()) == ["beta"])
        assert ids["alice"] in beta.registry


def fail_to_open(journal: Journal) -> None:
    raise JournalError("the disk is full")


async def test_who_reads_what_cannot_be_taken_over_for_now_comes_back_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica("beta", folder) as beta, anyio.create_task_group() as tasks:
        with monkeypatch.context() as patches:
            async with replica("alpha", folder) as alpha:
                with alpha.runner.held():
                    id = await create(alpha)
                    reader = exchange(beta.asgi, "GET", f"/v1/streams/{id}/events", headers=SSE)
                    tasks.start_soon(reader.run)
                    alpha.runner.allow(5)
                    await reader.wait_until(lambda: text_of(reader.events()) == TEXT[:5])
                    patches.setattr(Journal, "_open", fail_to_open)
                    alpha.end_unfinished()
            await reader.done.wait()
            assert ends_of(reader.events()) == ["interrupted"]
            refused = await call(beta.asgi, "GET", f"/v1/streams/{id}")
            assert (refused.status, refused.json()["error"]["code"]) == (503, "journal_busy")
            assert [list(event) for event in (await read(beta, id)).events()] == [["retry"]]
        rest = (await read(beta, id, reader.events()[-1]["id"])).events()
    assert text_of(reader.events()) + text_of(rest) == TEXT


async def test_what_is_followed_and_cannot_be_taken_over_for_now_may_be_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.shared_journals._POLL_S", 600)
    async with replica("beta", folder) as beta:
        async with replica("alpha", folder) as alpha:
            with alpha.runner.held():
                path = f"/v1/streams/{await create(alpha)}"
                assert (await call(beta.asgi, "GET", path)).status == 200
                alpha.end_unfinished()
        with monkeypatch.context() as patches:
            patches.setattr(Journal, "_open", fail_to_open)
            refused = await call(beta.asgi, "GET", path)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "journal_busy")
        assert (await call(beta.asgi, "GET", path)).status == 200


async def test_a_folder_that_cannot_be_looked_at_is_told_of_once_and_looked_at_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "left"
    async with dead_replica("alpha", folder, left, 5) as alpha:
        id = await create(alpha)
        await until_said(alpha, id, 5)

    def fail(folder: JournalFolder) -> list[Path]:
        raise OSError("a disk that does not answer")

    async with replica("beta", left) as beta:
        with monkeypatch.context() as patch:
            patch.setattr(JournalFolder, "files", fail)
            for _ in range(3):
                await beta.take_over_left()
        assert caplog.text.count("cannot be looked for for now: OSError") == 1
        await beta.take_over_left()
        await beta.until(lambda: generation_of(beta, id).is_over)
        assert text_of((await read(beta, id)).events()) == TEXT


async def test_a_damaged_stream_is_none_elsewhere_and_its_neighbour_is_one(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        bad, good = await create(alpha), await create(alpha)
        for id in (bad, good):
            await read(alpha, id)
        with write(folder / "alpha" / "1.db") as db:
            db.execute(f'UPDATE "{bad}" SET crc = 1 WHERE position = 3')
        assert (await read(beta, bad)).status == 404
        assert text_of((await read(beta, good)).events()) == TEXT


async def test_what_cannot_be_read_on_ends_with_an_error(folder: Path) -> None:
    async with replica("alpha", folder) as alpha, replica("beta", folder) as beta:
        with alpha.runner.held():
            id = await create(alpha)
            async with following(beta, id) as reader:
                with write(folder / "alpha" / "1.db") as db:
                    db.execute(f"INSERT INTO \"{id}\" VALUES (7, x'00', 1)")
                await reader.done.wait()
        assert ends_of(reader.events()) == ["error"]


@contextmanager
def write(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(path)
    try:
        yield db
        db.commit()
    finally:
        db.close()


@pytest.mark.parametrize(
    "spoil",
    [lambda folder: folder.write_text("a file"), lambda folder: (folder / "alpha" / "1.db").mkdir(parents=True)],
    ids=["no_folder", "no_file"],
)
async def test_a_folder_that_cannot_be_had_is_named(folder: Path, spoil: Callable[[Path], object]) -> None:
    spoil(folder)
    with pytest.raises(JournalError, match="journal_dir: "):
        async with replica("alpha", folder):
            pass
