"""Several servers: ids that name their replica, and where to ask for what another one has."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_client import Exchange, call
from headrace.server.api_keys import append_key, create_key
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
BODY = {"prompt": "river", "max_tokens": 12, "temperature": 0}
RESPONSE = {"input": "hi", "max_output_tokens": 12, "temperature": 0}
BETA = "https://beta.example.org/llm"
PEERS = {"alpha": "http://10.0.0.1:8000", "beta": BETA, "hidden": ""}
OF_BETA = "beta-" + "0" * 32
OF_HIDDEN = "hidden-" + "0" * 32


@asynccontextmanager
async def replica(name: str = "alpha", **settings: Any) -> AsyncIterator[LiveApp]:
    async with live_app(replica_name=name, peers=json.dumps(PEERS), **settings) as app:
        yield app


def error_of(answer: Exchange) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


async def test_ids_begin_with_the_replicas_name_and_lead_back_to_what_they_name() -> None:
    async with replica() as app:
        stream = (await call(app.asgi, "POST", "/v1/streams", BODY)).json()
        assert re.fullmatch("alpha-[0-9a-f]{32}", stream["id"])
        events = (await call(app.asgi, "GET", stream["events_url"], headers=SSE)).events()
        assert all(event["id"].startswith(f"{stream['id']}:") for event in events if "id" in event)
        resumed = await call(app.asgi, "GET", "/v1/stream", headers=SSE | {"last-event-id": events[-2]["id"]})
        assert resumed.events()[-1] == events[-1]
        response = (await call(app.asgi, "POST", "/v1/responses", RESPONSE)).json()
        assert re.fullmatch("resp_alpha-[0-9a-f]{32}", response["id"])
        [item] = response["output"]
        reference = [{"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "and?"}]
        again = await call(app.asgi, "POST", "/v1/responses", RESPONSE | {"input": reference})
        listed = await call(app.asgi, "GET", f"/v1/responses/{again.json()['id']}/input_items")
        assert [each["id"] for each in listed.json()["data"]][1] == item["id"]
        ticket = (await call(app.asgi, "POST", "/v1/stream/tickets")).json()["ticket"]
        assert ticket.startswith("alpha.")
        answer = await call(app.asgi, "GET", "/v1/stream", headers=SSE, query=f"prompt=a&max_tokens=1&ticket={ticket}")
        assert answer.events()[-1]["event"] == "done"


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (f"/v1/streams/{OF_BETA}/events", ""),
        (f"/v1/streams/{OF_BETA}/events", f"last_event_id={OF_BETA}:3-1"),
        (f"/v1/streams/{OF_BETA}", ""),
        ("/v1/stream", f"last_event_id={OF_BETA}%3A3"),
        ("/v1/stream", f"prompt=a%20b&ticket=beta.{'x' * 43}"),
        (f"/v1/responses/resp_{OF_BETA}", "stream=true&starting_after=5"),
        (f"/v1/responses/resp_{OF_BETA}/input_items", "limit=5"),
    ],
)
async def test_who_reads_what_another_replica_has_is_sent_there_with_the_same_question(path: str, query: str) -> None:
    async with replica() as app:
        answer = await call(app.asgi, "GET", path, headers=SSE, query=query)
    assert (answer.status, answer.headers["location"]) == (307, f"{BETA}{path}" + (f"?{query}" if query else ""))
    assert answer.headers["cache-control"] == "no-store"
    assert (error_of(answer)["code"], error_of(answer)["replica"]) == ("other_replica", "beta")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("DELETE", f"/v1/streams/{OF_BETA}", None, None),
        ("DELETE", f"/v1/responses/resp_{OF_BETA}", None, "id"),
        ("POST", f"/v1/responses/resp_{OF_BETA}/cancel", None, "id"),
        ("POST", "/v1/responses", RESPONSE | {"previous_response_id": f"resp_{OF_BETA}"}, "previous_response_id"),
        (
            "POST",
            "/v1/responses",
            RESPONSE | {"input": [{"type": "item_reference", "id": f"msg_{OF_BETA}_o0"}]},
            "input[0].id",
        ),
        ("GET", f"/v1/streams/{OF_HIDDEN}/events", None, None),
        ("GET", f"/v1/responses/resp_{OF_HIDDEN}", None, "id"),
    ],
)
async def test_who_changes_it_or_may_not_know_where_it_is_is_told_whose_it_is(
    method: str, path: str, body: Any, param: str | None
) -> None:
    async with replica() as app:
        answer = await call(app.asgi, method, path, body, headers=SSE)
    assert answer.status == 421
    assert "location" not in answer.headers
    error = error_of(answer)
    name, url = ("hidden", None) if "hidden" in path else ("beta", BETA)
    assert (error["code"], error["replica"], error["url"], error["param"]) == ("other_replica", name, url, param)


@pytest.mark.parametrize(
    "id",
    [
        "alpha-" + "0" * 32,  # of this one, and unknown
        "gamma-" + "0" * 32,
        "0" * 32,
        "-" + "0" * 32,
        "BETA-" + "0" * 32,
        "beta-" + "0" * 31,
        "beta-" + "0" * 33,
        "beta-" + "g" * 32,
        "beta--" + "0" * 32,
        "beta-" + "0" * 32 + "\n",
        "beta-" + "\u0660" * 32,
        "beta\r\nx: y-" + "0" * 32,
        "beta@evil.example.org-" + "0" * 32,
        "..-" + "0" * 32,
    ],
)
async def test_what_names_no_other_replica_is_unknown(id: str) -> None:
    async with replica() as app:
        for method, path in (
            ("GET", f"/v1/streams/{id}/events"),
            ("DELETE", f"/v1/streams/{id}"),
            ("GET", f"/v1/responses/resp_{id}"),
        ):
            answer = await call(app.asgi, method, path, headers=SSE)
            assert (answer.status, error_of(answer)["code"]) == (404, "not_found")


async def test_where_a_server_is_alone_no_name_leads_anywhere() -> None:
    async with live_app() as app:
        for method in ("GET", "DELETE"):
            assert (await call(app.asgi, method, f"/v1/streams/{OF_BETA}")).status == 404
        ids = [(await call(app.asgi, "POST", "/v1/streams", BODY)).json()["id"] for _ in range(2)]
        assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)


async def test_a_forged_name_leads_to_no_stream_wherever_it_is_asked_for() -> None:
    async with AsyncExitStack() as stack:
        apps = {name: await stack.enter_async_context(replica(name)) for name in ("alpha", "beta")}
        made = {name: (await call(app.asgi, "POST", "/v1/streams", BODY)).json()["id"] for name, app in apps.items()}
        for name, other in (("alpha", "beta"), ("beta", "alpha")):
            own = await call(apps[name].asgi, "GET", f"/v1/streams/{made[name]}/events", headers=SSE)
            assert own.events()[-1]["event"] == "done"
            forged = made[name].replace(name, other)
            sent = await call(apps[name].asgi, "GET", f"/v1/streams/{forged}/events", headers=SSE)
            assert sent.headers["location"].startswith(PEERS[other])
            assert (await call(apps[other].asgi, "GET", f"/v1/streams/{forged}/events", headers=SSE)).status == 404


@pytest.mark.parametrize(
    "query",
    ["a=//evil.example.org", "a=%0d%0alocation:%20x", "a=b#c", "a=\x7f", 'a="<>', "next=https://evil.example.org"],
)
async def test_only_the_table_says_where_to(query: str) -> None:
    async with replica(allowed_hosts="evil.example.org") as app:
        path = f"/v1/streams/{OF_BETA}/events"
        headers = SSE | {"host": "evil.example.org", "x-forwarded-host": "evil.example.org"}
        location = (await call(app.asgi, "GET", path, headers=headers, query=query)).headers["location"]
    assert location.startswith(f"{BETA}{path}?")
    assert re.fullmatch("[!-~]+", location)
    assert "#" not in location


async def test_a_key_that_a_client_would_not_take_along_is_no_reason_to_send_it(tmp_path: Path) -> None:
    secret, key = create_key("alice")
    append_key(tmp_path / "keys.toml", key)
    bearer, header = {"authorization": f"Bearer {secret}"}, {"x-api-key": secret}
    snapshot, events = f"/v1/streams/{OF_BETA}", f"/v1/streams/{OF_BETA}/events"
    async with replica(api_keys_file=tmp_path / "keys.toml") as app:
        for path, headers, status in (
            (snapshot, bearer, 421),
            (snapshot, header, 307),
            (snapshot, {}, 401),
            (events, bearer, 307),  # where no key is needed
            (events, {}, 307),
        ):
            assert (await call(app.asgi, "GET", path, headers=SSE | headers)).status == status


async def test_a_page_of_another_origin_may_follow() -> None:
    origin = "https://chat.example.org"
    async with replica(cors_origins=origin) as app:
        answer = await call(app.asgi, "GET", f"/v1/streams/{OF_BETA}/events", headers=SSE | {"origin": origin})
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (307, origin)


async def test_the_chat_page_may_read_from_the_others_and_from_nobody_else() -> None:
    async with replica() as app:
        page = await call(app.asgi, "GET", "/")
    assert "connect-src 'self' http://10.0.0.1:8000 https://beta.example.org" in page.headers["content-security-policy"]
    async with live_app() as app:
        assert "connect-src" not in (await call(app.asgi, "GET", "/")).headers["content-security-policy"]


async def test_the_document_tells_of_other_replicas_where_there_are_some() -> None:
    for name, statuses in (("", set()), ("alpha", {"307", "421"})):
        async with live_app(replica_name=name) as app:
            document = (await call(app.asgi, "GET", "/openapi.json")).json()
        for path in ("/v1/stream", "/v1/streams/{id}", "/v1/streams/{id}/events", "/v1/responses/{id}"):
            assert {"307", "421"} & document["paths"][path]["get"]["responses"].keys() == statuses
