"""Native streams that outlive their process, as clients meet them before and after it ends."""

import json
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from asgi_client import Exchange, call, exchange
from fake_engine import FakeRunner, expected_text, make_scheduler
from headrace.scheduler.config import SchedulingPolicy
from headrace.scheduler.engine_core import ComputedStep, LaunchedStep
from headrace.scheduler.messages import SequenceOutput
from headrace.scheduler.prompt_lookup import verified
from headrace.scheduler.scheduler import SchedulerOutput
from headrace.server.api_keys import append_key, create_key
from headrace.server.generation import Generation
from killed_app import killed_app
from live_app import LiveApp, live_app
from recorded_streams import RECIPE, crash, recorder

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
NUM_TOKENS = 12
BODY = {"prompt": "river", "max_tokens": NUM_TOKENS, "temperature": 0}
TEXT = expected_text("river", NUM_TOKENS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal" / "streams.db"


class CharacterRunner(FakeRunner):
    """Says characters of one to four bytes, a byte in each step but for what of a draft comes true."""

    text = "Zé€😀".encode()

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        results = []
        for row, result in zip(output.rows, super().launch(output).wait(), strict=True):
            if result.token_id is not None:
                first = row.start + row.num_tokens - len(row.draft)
                places = [self.text[(first + i) % len(self.text)] for i in range(1 + len(row.draft))]
                token_id, *more = verified(row.draft, places)
                result = result._replace(token_id=token_id, more_token_ids=tuple(more))
            results.append(result)
        return ComputedStep(results)


class DyingRunner(FakeRunner):
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        super().launch(output)
        raise SystemExit("as told")


async def create(app: LiveApp, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = await call(app.asgi, "POST", "/v1/streams", BODY | fields, headers=headers)
    assert answer.status == 201, answer.body
    created: dict[str, Any] = answer.json()
    return created


async def read(app: LiveApp, stream: dict[str, Any], last_event_id: str | None = None) -> Exchange:
    headers = SSE if last_event_id is None else SSE | {"last-event-id": last_event_id}
    return await call(app.asgi, "GET", stream["events_url"], headers=headers)


async def begin(app: LiveApp, num_tokens: int) -> tuple[dict[str, Any], Generation]:
    """A stream that has come so far, whose app's runner is held."""
    stream = await create(app)
    generation = app.registry.get(stream["id"]).generation
    app.runner.allow(num_tokens)
    await app.until(lambda: generation.num_output_tokens == num_tokens)
    return stream, generation


def ask(app: LiveApp, tasks: TaskGroup, path: str, **fields: Any) -> Exchange:
    """A request under way."""
    request = exchange(app.asgi, "POST", path)
    request.send_body(json.dumps(BODY | fields).encode())
    tasks.start_soon(request.run)
    return request


def hang_disk(app: LiveApp) -> threading.Event:
    """Have the journal wait for its disk until the event is set."""
    disk_answers = threading.Event()
    assert app.journal is not None
    app.journal._put(lambda db: disk_answers.wait())  # type: ignore[arg-type]
    return disk_answers


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(json.loads(event["data"])["text"] for event in events if event.get("event") == "token")


async def read_some(app: LiveApp, stream: dict[str, Any], num_tokens: int) -> list[dict[str, str]]:
    """What a reader has seen who is cut off once there are so many tokens."""
    generation = app.registry.get(stream["id"]).generation
    await app.until(lambda: generation.num_output_tokens >= num_tokens)
    reader = exchange(app.asgi, "GET", stream["events_url"], headers=SSE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.run)
        await reader.wait_until(lambda: b"event: token" in reader.body)
        reader.disconnect()
    return reader.events()


async def test_a_stream_goes_on_at_its_next_token_after_a_kill_and_after_another(path: Path, tmp_path: Path) -> None:
    async with killed_app(path, tmp_path / "1", 4) as (app, second_path):
        stream = await create(app)
        seen = await read_some(app, stream, 4)
    async with killed_app(second_path, tmp_path / "2", 3) as (app, third_path):
        generation = app.registry.get(stream["id"]).generation
        await app.until(lambda: generation.num_output_tokens == 7)
    async with killed_app(third_path, tmp_path / "3", 0) as (app, second_path):
        assert app.registry.get(stream["id"]).generation.num_output_tokens == 7
    async with live_app(journal_file=second_path) as app:
        rest = (await read(app, stream, seen[-1]["id"])).events()
        whole = (await read(app, stream)).events()
        assert app.runner.num_steps == NUM_TOKENS - 7, "what there was is part of the prompt"
    assert text_of(seen) == TEXT[:4]
    assert text_of(seen) + text_of(rest) == text_of(whole) == TEXT
    assert rest[-1]["event"] == "done"
    counts = json.loads(rest[-1]["data"])["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (5, NUM_TOKENS)
    tokens = [json.loads(event["data"]) for event in rest if event.get("event") == "token"]
    assert sum(event["num_tokens"] for event in tokens) == NUM_TOKENS - 4


# Asked of the fake model together: what is resumed of each is more than its text.
VARIETY: tuple[dict[str, Any], ...] = (
    {"stop": [TEXT[7:9], "😀Zé€😀Z"], "max_tokens": 30},
    {"logprobs": 2},
    {"echo": True, "logprobs": 1},
    {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"prompt": [200, 131, 98], "min_tokens": 3, "skip_special_tokens": False},
    {"presence_penalty": 0.5, "seed": 7, "temperature": 1.5, "top_p": 0.9},
    {"prompt": "a long prompt that takes several steps " * 6, "echo": True, "logprobs": 1},
)


def contents_of(events: list[dict[str, str]]) -> dict[str, Any]:
    """All but what depends on when a reader came."""
    found: dict[str, Any] = {"text": "", "logprobs": [], "num_tokens": 0}
    for event in events:
        if event.get("event") == "token":
            data = json.loads(event["data"])
            for name in found:
                found[name] += data.get(name, type(found[name])())
    done = json.loads(events[-1]["data"])
    del done["timings"], done["usage"]["prompt_tokens_details"]
    cursor = events[-1]["id"].partition(":")[2].partition("-")[0]
    return found | {"event": events[-1]["event"], "done": done, "cursor": cursor}


@pytest.mark.parametrize("make_runner", [FakeRunner, CharacterRunner])
async def test_after_a_kill_at_any_step_events_and_cursors_are_those_of_an_uninterrupted_run(
    path: Path, tmp_path: Path, make_runner: type[FakeRunner]
) -> None:
    async with live_app(runner=make_runner()) as app:
        expected = [contents_of((await read(app, await create(app, **fields))).events()) for fields in VARIETY]
    for num_steps in (0, 1, 3, 7, 11):
        first = path.with_name(f"{num_steps}.db")
        async with killed_app(first, tmp_path / str(num_steps), 0, runner=make_runner()) as (app, second_path):
            streams = [await create(app, **fields) for fields in VARIETY]
            app.runner.allow(num_steps)
            await app.until(lambda app=app: app.runner._num_allowed == 0)  # type: ignore[misc]
        async with live_app(journal_file=second_path, runner=make_runner()) as app:
            assert [contents_of((await read(app, stream)).events()) for stream in streams] == expected


async def test_after_a_kill_between_drafts_events_and_cursors_are_those_without_them(
    path: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"prompt": "river", "max_tokens": 60}
    async with live_app(runner=CharacterRunner()) as app:
        expected = contents_of((await read(app, await create(app, **fields))).events())
    for num_steps in (13, 14, 16):
        first = path.with_name(f"{num_steps}.db")
        policy = SchedulingPolicy(num_speculative_tokens=8)
        scheduler, again = make_scheduler(policy=policy), make_scheduler(policy=policy)
        killed = killed_app(first, tmp_path / str(num_steps), 0, runner=CharacterRunner(), scheduler=scheduler)
        async with killed as (app, second_path):
            stream = await create(app, **fields)
            app.runner.allow(num_steps)
            await app.until(lambda app=app: app.runner._num_allowed == 0)  # type: ignore[misc]
            assert scheduler.load().num_accepted_tokens > 0
        async with live_app(journal_file=second_path, runner=CharacterRunner(), scheduler=again) as app:
            assert contents_of((await read(app, stream)).events()) == expected
            assert again.load().num_accepted_tokens > 0


async def test_a_finished_stream_is_read_again_and_an_old_one_is_erased(path: Path, tmp_path: Path) -> None:
    async with live_app(journal_file=path) as app:
        stream = await create(app)
        first = (await read(app, stream)).events()
        snapshot = (await call(app.asgi, "GET", stream["url"])).json()
        crash(path, tmp_path / "kill")
    async with live_app(journal_file=path) as app:
        again = (await read(app, stream)).events()
        assert text_of(again) == TEXT
        assert again[-1]["id"] == first[-1]["id"]
        assert (await read(app, stream, again[-1]["id"])).status == 204
        later = (await call(app.asgi, "GET", stream["url"])).json()
        for name, seconds in later["timings"].items():
            assert seconds == pytest.approx(snapshot["timings"].pop(name), abs=0.2)
        assert later | {"timings": {}} == snapshot
        assert app.runner.num_steps == 0
    async with live_app(journal_file=tmp_path / "kill" / path.name, stream_ttl_s=0) as app:
        await app.until(lambda: stream["id"] not in app.registry._finished)
        assert (await read(app, stream)).status == 410
    async with live_app(journal_file=tmp_path / "kill" / path.name) as app:
        assert (await read(app, stream)).status == 404


async def test_a_stream_that_was_cancelled_stays_cancelled(path: Path, tmp_path: Path) -> None:
    async with killed_app(path, tmp_path / "kill", 3) as (app, second_path):
        stream = await create(app)
        seen = await read_some(app, stream, 3)
        deleted = (await call(app.asgi, "DELETE", stream["url"])).json()
        assert deleted["finish_reason"] == "cancelled"
        assert (await call(app.asgi, "DELETE", stream["url"])).json() == deleted
    async with live_app(journal_file=second_path) as app:
        snapshot = (await call(app.asgi, "GET", stream["url"])).json()
        assert (snapshot["text"], snapshot["finish_reason"]) == (TEXT[:3], "cancelled")
        [_, done] = (await read(app, stream, seen[-1]["id"])).events()
        assert done["event"] == "done"


async def test_a_client_that_leaves_before_its_answer_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with killed_app(path, tmp_path / "kill", 0) as (app, second_path):
        assert app.journal is not None
        accept = app.journal.accept
        with monkeypatch.context() as patch:
            # Its commit is never heard of.
            patch.setattr(
                app.journal, "accept", lambda request_id, record, then: accept(request_id, record, lambda: None)
            )
            async with anyio.create_task_group() as tasks:
                request = ask(app, tasks, "/v1/streams")
                await app.until(lambda: bool(app.registry._running))
                [id] = app.registry._running
                assert request.status is None
                request.disconnect()
        await app.until(lambda: id in app.registry._tombstones)
        await read(app, {"events_url": f"/v1/streams/{id}/events"})
        await app.until(lambda: id not in app.journal._ids)  # type: ignore[union-attr]
    async with live_app(journal_file=second_path) as app:
        assert (await call(app.asgi, "GET", f"/v1/streams/{id}")).status == 404


async def test_a_drain_interrupts_readers_at_their_cursor_and_the_next_process_goes_on(path: Path) -> None:
    stop = TEXT[5:8] + "!"  # its first characters are held back when the end comes
    async with live_app(journal_file=path) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = await create(app, stop=[stop])
            whole = ask(app, tasks, "/v1/completions")
            reader = exchange(app.asgi, "GET", stream["events_url"], headers=SSE)
            tasks.start_soon(reader.run)
            await app.until(lambda: app.client.num_unfinished == 2)
            app.runner.allow(7)
            generation = app.registry.get(stream["id"]).generation
            await app.until(lambda: generation.num_output_tokens >= 6)
            app.stop_accepting()
            app.end_unfinished()
            await reader.done.wait()
            await whole.done.wait()
        assert generation.is_over
    events = reader.events()
    assert reader.is_complete
    assert events[-1]["event"] == "interrupted"
    data = json.loads(events[-1]["data"])
    assert (data["code"], data["resumable"]) == ("draining", True)
    assert events[-1]["id"] == events[-2]["id"]
    assert (whole.status, whole.json()["error"]["resumable"]) == (503, False)
    async with live_app(journal_file=path) as app:
        rest = (await read(app, stream, events[-1]["id"])).events()
    assert text_of(events) + text_of(rest) == TEXT


async def test_without_a_journal_a_drain_ends_streams_for_good(path: Path) -> None:
    async with live_app() as app:
        with app.runner.held():
            stream = await create(app)
            app.stop_accepting()
            app.end_unfinished()
            events = (await read(app, stream)).events()
    assert events[-1]["event"] == "error"
    assert json.loads(events[-1]["data"])["error"]["resumable"] is False


async def test_until_the_journal_is_read_no_stream_is_said_not_to_exist(path: Path) -> None:
    async with live_app(journal_file=path) as app:
        app.registry.is_whole = False
        for query, url in (("", "/v1/streams/x/events"), ("last_event_id=x:3", "/v1/stream")):
            answer = await call(app.asgi, "GET", url, headers=SSE, query=query)
            assert (answer.status, list(answer.events()[0])) == (200, ["retry"])
        for method in ("GET", "DELETE"):
            answer = await call(app.asgi, method, "/v1/streams/x")
            assert (answer.status, answer.json()["error"]["code"]) == (503, "loading")


async def test_streams_of_a_tenant_that_is_none_any_more_are_erased(path: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    headers = {}
    for name in ("alice", "bob"):
        secret, key = create_key(name)
        append_key(keys, key)
        headers[name] = {"authorization": f"Bearer {secret}"}
    async with killed_app(path, tmp_path / "kill", 0, api_keys_file=keys) as (app, second_path):
        streams = {name: await create(app, headers[name]) for name in headers}
    keys.write_text(keys.read_text()[keys.read_text().rindex("[[keys]]") :])
    async with live_app(journal_file=second_path, api_keys_file=keys) as app:
        assert (await read(app, streams["alice"])).status == 410
        assert text_of((await read(app, streams["bob"])).events()) == TEXT
        [account] = {output.tenant for output in app.registry._finished.values()}
        assert account == "bob"


async def test_where_a_crash_has_lost_what_a_reader_saw_it_is_told_so_however_long_the_log_has_become(
    path: Path, tmp_path: Path
) -> None:
    async with killed_app(path, tmp_path / "kill", 6) as (app, _):
        stream = await create(app)
        await read_some(app, stream, 4)
        app.registry.get(stream["id"])
        await app.until(lambda: app.registry.get(stream["id"]).generation.num_output_tokens == 6)
    lost = tmp_path / "lost.db"
    recorded = recorder(tmp_path / "kill" / path.name, model="fake ")
    with recorded as found, recorder(lost, model="fake ") as shorter:
        [before] = found.read().streams
        shorter.do(shorter.journal.accept, 0, before.record)
        for _, output in before.outputs[:3]:
            assert output is not None
            shorter.publish(output._replace(request_id=0))
    async with live_app(journal_file=lost) as app:
        for cursor, status in ((0, 200), (3, 200), (4, 410), (6, 410)):
            assert (await read(app, stream, f"{stream['id']}:{cursor}")).status == status
        whole = (await read(app, stream)).events()
        assert text_of(whole) == TEXT
        again = await read(app, stream, f"{stream['id']}:6")
        assert (again.status, again.json()["error"]["code"]) == (410, "events_lost")
        assert (await read(app, stream, f"{stream['id']}:6-1")).status == 200
        assert (await read(app, stream, f"{stream['id']}:6-2")).status == 410
        assert (await read(app, stream, whole[-1]["id"])).status == 204


async def test_a_disk_that_is_full_ends_the_journal_and_no_stream(path: Path, tmp_path: Path) -> None:
    async with live_app(journal_file=path) as app:
        with app.runner.held():
            stream = await create(app)
            app.runner.allow(2)
            seen = await read_some(app, stream, 2)
            assert app.journal is not None
            # The limit is the size that it has already.
            app.journal._put(lambda db: db.executescript("PRAGMA max_page_count = 1; CREATE TABLE more (x)").close())
            await app.until(lambda: not app.journal.is_active)  # type: ignore[union-attr]
            assert b"headrace_journal_active 0.0" in app.client.metrics.expose()
        rest = (await read(app, stream, seen[-1]["id"])).events()
        assert text_of(seen) + text_of(rest) == TEXT
        assert text_of((await read(app, await create(app, prompt="more"))).events()) == expected_text("more", 12)
    async with live_app(journal_file=path) as app:
        assert (await read(app, stream, seen[-1]["id"])).status == 404


async def test_the_engines_end_is_recorded_as_every_streams(path: Path) -> None:
    async with live_app(journal_file=path, runner=DyingRunner()) as app:
        stream = await create(app)
        first = (await read(app, stream)).events()
        app.scheduler.fail_all("")  # which its thread has left behind
    async with live_app(journal_file=path) as app:
        again = (await read(app, stream)).events()
        assert again[-1] == first[-1]
        assert json.loads(again[-1]["data"])["error"]["code"] == "engine_error"


async def test_a_damaged_stream_is_gone_and_its_neighbour_goes_on(path: Path, tmp_path: Path) -> None:
    async with killed_app(path, tmp_path / "kill", 2) as (app, second_path):
        bad, good = [await create(app, prompt=prompt) for prompt in ("river", "mill")]
    db = sqlite3.connect(second_path)
    db.execute(f'UPDATE "{bad["id"]}" SET crc = 1')
    db.commit()
    db.close()
    async with live_app(journal_file=second_path) as app:
        assert (await read(app, bad)).status == 410
        assert text_of((await read(app, good)).events()) == expected_text("mill", NUM_TOKENS)
        await app.until(lambda: bad["id"] not in app.journal._ids)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["streams.db", "streams.db-wal"])
async def test_whatever_is_left_of_the_files_each_stream_goes_on_exactly_or_is_gone(
    path: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.journal._ERASED_WITHIN_S", 0.01)
    prompts = ["river", "mill", "wheel", "race"]
    async with killed_app(path, tmp_path / "kill", 0) as (app, _):
        streams = [await create(app, prompt=prompt) for prompt in prompts[:3]]
        app.runner.allow(4)
        early = [await read_some(app, stream, 3) for stream in streams]
        streams.append(await create(app, prompt=prompts[3]))
        assert app.journal is not None
        app.journal.erase(streams.pop()["id"])
        await app.until(lambda: path.with_name("streams.db-wal").stat().st_size == 0)  # half of it is in either file
        app.runner.allow(3)
        late = [await read_some(app, stream, 6) for stream in streams]
    content = (tmp_path / "kill" / name).read_bytes()
    rng = random.Random(name)
    outcomes = set()
    for case in range(10):
        folder = tmp_path / str(case)
        shutil.copytree(tmp_path / "kill", folder)
        at, num_bytes = rng.randrange(len(content)), rng.choice([8, 600, 5000])
        tail = b"" if case % 2 else rng.randbytes(num_bytes) + content[at + num_bytes :]
        (folder / name).write_bytes(content[:at] + tail)
        async with live_app(journal_file=folder / path.name) as app:
            for prompt, stream, seen in zip(prompts[:3] * 2, streams * 2, early + late, strict=True):
                rest = await read(app, stream, seen[-1]["id"])
                outcomes.add(rest.status)
                if rest.status == 200:
                    assert text_of(seen) + text_of(rest.events()) == expected_text(prompt, NUM_TOKENS)
                else:
                    assert rest.status in (404, 410)
            assert text_of((await read(app, await create(app))).events()) == TEXT
    assert len(outcomes) > 1, "some cases go on, some do not"


class FatalRunner(FakeRunner):
    """Kills the process in a step with the second chunk of such a prompt, as far as a copy of its files tells."""

    poison = "x" * 100

    def __init__(self, path: Path, copy: Path) -> None:
        super().__init__()
        self.path, self.copy = path, copy

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        poison = tuple(self.poison.encode())
        if any(row.sequence.request.prompt_token_ids == poison and row.start > 0 for row in output.rows):
            if not self.copy.exists():
                crash(self.path, self.copy)
            raise RuntimeError("for the process that has survived")
        return super().launch(output)


async def test_what_ends_the_process_again_and_again_is_given_up_and_costs_no_other_stream(
    path: Path, tmp_path: Path
) -> None:
    innocent_prompts = ["river", "mill"]
    streams: list[dict[str, Any]] = []
    for num_restarts in range(10):
        runner = FatalRunner(path, tmp_path / str(num_restarts))
        async with live_app(journal_file=path, runner=runner) as app:
            if not streams:
                with runner.held():
                    streams = [await create(app, prompt=prompt) for prompt in (FatalRunner.poison, *innocent_prompts)]
            bad, *innocent = [(await read(app, stream)).events() for stream in streams]
        if not runner.copy.exists():
            break
        path = runner.copy / path.name
    assert num_restarts == 6, "five times it was taken up in vain"
    assert bad[-1]["event"] == "error"
    assert [text_of(events) for events in innocent] == [
        expected_text(prompt, NUM_TOKENS) for prompt in innocent_prompts
    ]
    async with live_app(journal_file=path) as app:
        assert (await read(app, streams[0])).events()[-1] == bad[-1]


async def test_of_suspects_only_the_one_that_is_computed_is_suspected_more(path: Path, tmp_path: Path) -> None:
    def num_vain(journal_path: Path) -> dict[str, int]:
        with recorder(journal_path, model="fake ") as found:
            return {stream.record.id: stream.num_vain_restarts for stream in found.read().streams}

    with recorder(path, model="fake ") as recording:
        prompts = {"suspect": FatalRunner.poison, "other suspect": "mill", "newcomer": "river"}
        for i, (id, prompt) in enumerate(prompts.items()):
            recording.accept(i, id, recipe=replace(RECIPE, prompt_token_ids=tuple(prompt.encode())))
        for ids in (["suspect", "other suspect", "newcomer"], ["suspect", "other suspect"]):
            recording.do(recording.journal.resume, dict(enumerate(ids)))
    runner = FatalRunner(path, tmp_path / "kill")
    async with live_app(journal_file=path, runner=runner) as app:
        assert app.registry.get("newcomer").unread_since_s is not None
    assert num_vain(tmp_path / "kill" / path.name) == {"suspect": 3, "other suspect": 2, "newcomer": 1}


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("x" * 60, "60 prompt tokens and 12 of the answer exceed"), ([280, 65], "no token 280")],
)
async def test_a_stream_that_no_longer_fits_ends_with_an_error_and_its_neighbour_goes_on(
    path: Path, tmp_path: Path, prompt: str | list[int], error: str
) -> None:
    large = FakeRunner()
    large.vocab_size = 300
    async with killed_app(path, tmp_path / "kill", 4, runner=large) as (app, second_path):
        bad, good = [await create(app, prompt=prompt) for prompt in (prompt, "river")]
        generation = app.registry.get(bad["id"]).generation
        await app.until(lambda: generation.num_output_tokens >= 2)
    async with live_app(journal_file=second_path, runner=FakeRunner(max_context_tokens=64)) as app:
        events = (await read(app, bad)).events()
        assert events[-1]["event"] == "error"
        assert error in json.loads(events[-1]["data"])["error"]["message"]
        assert len(text_of(events)) >= 2
        assert text_of((await read(app, good)).events()) == TEXT
    async with live_app(journal_file=second_path) as app:
        assert (await read(app, bad)).events()[-1] == events[-1]


async def test_a_disk_that_hangs_holds_up_what_is_recorded_and_nothing_else(path: Path) -> None:
    async with live_app(journal_file=path) as app:
        with app.runner.held():
            stream, generation = await begin(app, 4)
            disk_answers = hang_disk(app)
        whole = await call(app.asgi, "POST", "/v1/completions", BODY)
        assert whole.json()["choices"][0]["text"] == TEXT
        await app.until(lambda: app.client.load.num_running == 0)
        assert (generation.num_output_tokens, generation.is_over) == (4, False)
        disk_answers.set()
        events = (await read(app, stream)).events()
    assert text_of(events) == TEXT
    assert events[-1]["event"] == "done"


async def test_who_waits_for_the_disk_does_not_wait_for_the_engine_in_admissions_eyes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_tokens_s: list[float] = []
    async with live_app(journal_file=path) as app, anyio.create_task_group() as tasks:
        monkeypatch.setattr(app.client.admission, "observe", lambda _, actual_s: first_tokens_s.append(actual_s))
        with app.runner.held():
            disk_answers = hang_disk(app)
            asked = [ask(app, tasks, "/v1/streams", prompt="word " * 20) for _ in range(4)]
            await app.until(lambda: app.client.num_unfinished == 4)
            asked[0].disconnect()
            await asked[0].done.wait()
        await app.until(lambda: app.client.load.num_received == 4 and app.client.load.num_running == 0)
        assert app.client.num_unfinished == 4
        assert app.client.admission.num_queued_tokens == 0
        assert len(first_tokens_s) == 3, "the disk's time is not the engine's"
        disk_answers.set()
        for one in asked:
            await one.done.wait()
        await app.until(lambda: app.client.num_unfinished == 0)
        assert len(first_tokens_s) == 3


async def test_where_the_engine_ends_nobody_but_who_is_recorded_waits_for_the_disk(path: Path) -> None:
    async with live_app(journal_file=path, runner=DyingRunner()) as app, anyio.create_task_group() as tasks:
        with app.runner.held():
            stream = await create(app)
            generation = app.registry.get(stream["id"]).generation
            disk_answers = hang_disk(app)
            whole = ask(app, tasks, "/v1/completions")
            await app.until(lambda: app.client.num_unfinished == 2)
        await whole.done.wait()
        assert whole.json()["error"]["code"] == "engine_error"
        late = await call(app.asgi, "POST", "/v1/streams", BODY)
        assert (late.status, late.json()["error"]["code"]) == (503, "engine_dead")
        assert not generation.is_over
        disk_answers.set()
        seen = (await read(app, stream)).events()
        app.scheduler.fail_all("")  # which its thread has left behind
    async with live_app(journal_file=path) as app:
        assert (await read(app, stream)).events()[-1] == seen[-1]
    assert json.loads(seen[-1]["data"])["error"]["code"] == "engine_error"


async def test_a_drain_does_not_wait_for_the_disk_and_leaves_its_streams_to_the_next_process(path: Path) -> None:
    async with live_app(journal_file=path) as app:
        with app.runner.held():
            stream, generation = await begin(app, 4)
            disk_answers = hang_disk(app)
            app.runner.allow(1)
            await app.until(lambda: app.runner.num_steps == 5)  # whose token waits for the disk
            app.stop_accepting()
            app.end_unfinished()
            assert generation.is_over
            snapshot = (await call(app.asgi, "GET", stream["url"])).json()
            deletion = await call(app.asgi, "DELETE", stream["url"])
            disk_answers.set()
    assert (snapshot["status"], snapshot["finish_reason"], snapshot["text"]) == ("interrupted", None, TEXT[:4])
    assert snapshot["cursor"] == 4
    assert (deletion.status, deletion.json()["error"]["code"]) == (503, "draining")
    async with live_app(journal_file=path) as app:
        rest = (await read(app, stream, snapshot["last_event_id"])).events()
    assert TEXT[:4] + text_of(rest) == TEXT
    assert rest[-1]["event"] == "done"


async def test_a_stream_that_is_cancelled_again_before_that_is_recorded_is_cancelled_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live_app(journal_file=path) as app:
        with app.runner.held():
            generation = app.registry.get((await create(app))["id"]).generation
            assert app.journal is not None
            ends: list[SequenceOutput] = []
            record = app.journal.record

            def count_ends(outputs: Sequence[SequenceOutput], then: Callable[[], None]) -> None:
                ends.extend(output for output in outputs if output.finish_reason is not None)
                record(outputs, then)

            monkeypatch.setattr(app.journal, "record", count_ends)
            for _ in range(3):
                app.client.cancel(generation)
            await app.until(lambda: generation.is_over)
        assert len(ends) == 1


async def test_timings_are_those_of_the_process_that_did_each_part(path: Path, tmp_path: Path) -> None:
    async with killed_app(path, tmp_path / "kill", 3) as (app, second_path):
        stream = await create(app)
        generation = app.registry.get(stream["id"]).generation
        await app.until(lambda: generation.num_output_tokens == 3)
        before = generation.timings()
    async with live_app(journal_file=second_path) as app:
        after = json.loads((await read(app, stream)).events()[-1]["data"])["timings"]
    for name in ("queue_s", "prefill_s", "ttft_s"):
        assert after[name] >= 0
        assert after[name] == pytest.approx(before[name], abs=0.2)


async def test_prompts_in_the_file_count_for_what_finished_streams_may_hold(path: Path) -> None:
    async with live_app(journal_file=path, stream_log_bytes=12_000) as app:
        streams = [await create(app, prompt=prompt * 400, max_tokens=1) for prompt in "ab"]
        for stream in streams:
            await read(app, stream)
        app.registry.sweep(app.client.clock())
        statuses = [(await call(app.asgi, "GET", stream["url"])).status for stream in streams]
        assert statuses == [410, 200]


async def test_a_finished_stream_is_kept_from_the_restart_on_whatever_the_wall_clock_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live_app(journal_file=path) as app:
        stream = await create(app)
        await read(app, stream)
    now = time.time()
    monkeypatch.setattr("headrace.server.journal.time.time", lambda: now + 3600)
    async with live_app(journal_file=path) as app:
        app.registry.sweep(app.client.clock() + app.settings.stream_ttl_s - 60)
        assert text_of((await read(app, stream)).events()) == TEXT
        app.registry.sweep(app.client.clock() + app.settings.stream_ttl_s)
        assert (await read(app, stream)).status == 410
