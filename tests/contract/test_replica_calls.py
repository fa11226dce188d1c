"""An ingress before replicas, whose calls are made in this process: what a client sees is what the replica answers, and
the replica hears of the client's departure."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.types import ASGIApp

from asgi_client import Exchange, call, chunks, exchange, parse_events
from fake_engine import expected_text
from headrace.server.replica_calls import ReplicaRequest, Results, answer, ingress_app, replica_lost
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

BODY = {"prompt": "hi", "temperature": 0, "max_tokens": 20}


@dataclass
class Setting:
    """The ingress, its one replica, and every request that the replica was sent."""

    ingress: ASGIApp
    app: LiveApp
    requests: list[ReplicaRequest]


@asynccontextmanager
async def replica(lose: Callable[[int], bool] = lambda num_results: False, **settings: Any) -> AsyncIterator[Setting]:
    """An ingress before an App. The replica is lost once `lose` holds for how many results it has given."""
    async with live_app(**settings) as app:
        requests: list[ReplicaRequest] = []

        async def call_replica(request: ReplicaRequest) -> Results:
            requests.append(request)
            if lose(0):
                raise replica_lost()
            results = answer(app.asgi, "mill", request)
            num_results = 0
            try:
                async for result in results:
                    yield result
                    num_results += 1
                    if lose(num_results):
                        raise replica_lost()
            finally:
                await results.aclose()

        yield Setting(ingress_app(app.settings, call_replica), app, requests)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_comes_through_as_the_replica_gives_it(is_stream: bool) -> None:
    async with replica() as setting:
        headers = {"x-request-id": "mine"}
        through = await call(setting.ingress, "POST", "/v1/completions", BODY | {"stream": is_stream}, headers=headers)
        direct = await call(setting.app.asgi, "POST", "/v1/completions", BODY | {"stream": is_stream}, headers=headers)
        assert through.status == direct.status == 200
        times = {"content-length": ""}  # of a body with times in it
        assert through.headers | times == direct.headers | times | {"x-headrace-replica": "mill"}
        assert through.headers["x-request-id"] == "mine"
        parts = chunks(through.body) if is_stream else [through.json()]
        assert "".join(part["choices"][0]["text"] for part in parts if part["choices"]) == expected_text("hi", 20)


async def test_tokens_come_as_they_are_made() -> None:
    async with replica() as setting, anyio.create_task_group() as tasks:
        with setting.app.runner.held():
            request = started(setting.ingress, "/v1/completions", tasks, stream=True)
            for num_tokens in range(1, 5):
                setting.app.runner.allow(1)
                await request.wait_until(
                    lambda num_tokens=num_tokens: text_of(request) == expected_text("hi", num_tokens)
                )
        await request.done.wait()
        assert text_of(request) == expected_text("hi", 20)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_takes_its_sequence_along_in_the_replica(is_stream: bool) -> None:
    async with replica() as setting, anyio.create_task_group() as tasks:
        app = setting.app
        with app.runner.held():
            request = started(setting.ingress, "/v1/completions", tasks, stream=is_stream, max_tokens=100)
            app.runner.allow(3)
            await app.until(lambda: app.client.load.num_steps >= 3)
            request.disconnect()
            await request.done.wait()
            assert app.client.num_unfinished == 0
            app.runner.allow(1)
            await app.until(lambda: app.client.load.num_running == 0)


async def test_a_client_that_leaves_before_its_body_is_whole_reaches_no_replica() -> None:
    async with replica() as setting, anyio.create_task_group() as tasks:
        request = exchange(setting.ingress, "POST", "/v1/completions")
        request.send_body(b'{"prompt"', more_body=True)
        tasks.start_soon(request.run)
        await anyio.wait_all_tasks_blocked()
        request.disconnect()
        await request.done.wait()
        assert request.messages == []
        assert setting.requests == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/health", 200),
        ("GET", "/", 200),
        ("HEAD", "/health", 200),
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/v1/stream", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/streams/unknown", 404),
    ],
)
async def test_every_other_route_is_the_replicas_to_answer(method: str, path: str, status: int) -> None:
    async with replica() as setting:
        through = await call(setting.ingress, method, path)
        direct = await call(setting.app.asgi, method, path)
        assert through.status == direct.status == status
        if status == 200 and path != "/health":
            assert through.body == direct.body


async def test_what_is_too_large_or_comes_too_slowly_is_refused_before_a_replica_is_asked() -> None:
    async with replica(max_body_bytes=100, max_image_bytes=100, receive_timeout_s=0.05) as setting:
        large = await call(setting.ingress, "POST", "/v1/completions", b" " * 101)
        assert (large.status, large.json()["error"]["code"]) == (413, "body_too_large")
        slow = exchange(setting.ingress, "POST", "/v1/messages")
        await slow.run()
        assert (slow.status, slow.json()["type"]) == (408, "error")
        assert setting.requests == []


async def test_a_replica_that_is_lost_before_it_answers_is_a_503_that_may_be_tried_again() -> None:
    async with replica(lose=lambda num_results: True) as setting:
        lost = await call(setting.ingress, "POST", "/v1/completions", BODY)
        assert (lost.status, lost.json()["error"]["code"]) == (503, "replica_lost")
        assert float(lost.headers["retry-after"]) >= 1
        source = await call(setting.ingress, "GET", "/v1/stream", query="prompt=hi")
        assert source.status == 200  # any other would end an EventSource for good
        assert source.body.startswith(b"retry: ")


@pytest.mark.parametrize(
    ("path", "body", "ended"),
    [
        ("/v1/completions", BODY, lambda events: json.loads(events[-1]["data"])["error"]["code"] == "replica_lost"),
        ("/v1/messages", None, lambda events: json.loads(events[-1]["data"])["error"]["type"] == "overloaded_error"),
        ("/v1/responses", {"input": "hi"}, lambda events: json.loads(events[-1]["data"])["type"] == "error"),
        ("/v1/stream", {}, lambda events: events[-1]["event"] == "error"),
    ],
)
async def test_a_stream_whose_replica_is_lost_ends_with_one_error_of_its_routes_form(
    path: str, body: dict[str, Any] | None, ended: Callable[[list[dict[str, str]]], bool]
) -> None:
    if body is None:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    async with replica(lose=lambda num_results: num_results == 2) as setting:
        with setting.app.runner.held():
            setting.app.runner.allow(2)
            if path == "/v1/stream":
                accept = {"accept": "text/event-stream"}
                lost = await call(setting.ingress, "GET", path, query="prompt=hi&max_tokens=20", headers=accept)
            else:
                lost = await call(setting.ingress, "POST", path, body | {"stream": True})
    assert lost.status == 200
    assert lost.is_complete
    events = list(parse_events(lost.body))
    assert len(events) > 1
    assert ended(events)


async def test_a_native_stream_that_another_replica_goes_on_with_is_interrupted(tmp_path: Path) -> None:
    settings = {"journal_dir": str(tmp_path), "replica_name": "mill"}
    async with replica(lose=lambda num_results: num_results == 2, **settings) as setting:
        with setting.app.runner.held():
            setting.app.runner.allow(2)
            accept = {"accept": "text/event-stream"}
            query = "prompt=hi&max_tokens=20"
            lost = await call(setting.ingress, "GET", "/v1/stream", query=query, headers=accept)
    *others, last = parse_events(lost.body)
    told = json.loads(last["data"])
    assert (last["event"], told["code"], told["resumable"]) == ("interrupted", "replica_lost", True)
    assert others
    assert "error" not in {event.get("event") for event in others}


async def test_ollamas_stream_ends_with_a_line_and_what_is_no_stream_is_cut() -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    async with replica(lose=lambda num_results: num_results == 2) as setting:
        with setting.app.runner.held():
            setting.app.runner.allow(2)
            lost = await call(setting.ingress, "POST", "/api/chat", chat)
        assert "error" in json.loads(lost.body.splitlines()[-1])
    async with replica(lose=lambda num_results: num_results == 1) as setting:
        whole = exchange(setting.ingress, "POST", "/v1/completions")
        whole.send_body(json.dumps(BODY).encode())
        with pytest.raises(ExceptionGroup):
            await whole.run()
        assert not whole.is_complete


async def test_an_id_names_the_replica_that_made_it_wherever_a_request_has_it() -> None:
    id = f"mill-{'0' * 31}1"
    async with replica() as setting:
        for path, query, headers, body in (
            (f"/v1/streams/{id}/events", "", {}, None),
            ("/metrics", "", {"x-headrace-replica": "mill"}, None),
            ("/v1/stream", "prompt=hi", {"last-event-id": f"{id}:12", "accept": "text/event-stream"}, None),
            ("/v1/stream", f"prompt=hi&ticket=mill.{'x' * 43}", {}, None),
            ("/v1/responses", "", {}, {"input": "hi", "previous_response_id": f"resp_{id}"}),
        ):
            await call(setting.ingress, "GET" if body is None else "POST", path, body, query=query, headers=headers)
        await call(setting.ingress, "POST", "/v1/completions", BODY | {"prompt": id}, headers={"idempotency-key": "k"})
        *named, unnamed = (request.destination for request in setting.requests)
        assert [destination.owners for destination in named] == [("mill",)] * 5
        assert (unnamed.owners, unnamed.idempotency_key) == ((), "k")


def started(app: ASGIApp, path: str, tasks: Any, **fields: Any) -> Exchange:
    request = exchange(app, "POST", path)
    request.send_body(json.dumps(BODY | fields).encode())
    tasks.start_soon(request.run)
    return request


def text_of(request: Exchange) -> str:
    events = [event["data"] for event in parse_events(request.body) if event["data"] != "[DONE]"]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["text"] for choice in choices)
