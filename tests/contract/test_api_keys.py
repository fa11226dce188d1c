"""A server with keys: what needs one, whose a stream is, and tickets for the browser's EventSource."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.routing import Route

from asgi_client import Exchange, call, exchange
from fake_engine import expected_text, make_scheduler
from headrace.server.api_keys import append_key, create_key
from headrace.server.tickets import TICKET_TTL_S
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

SSE = {"accept": "text/event-stream"}
BODY = {"prompt": "river", "max_tokens": 6, "temperature": 0}
QUERY = "prompt=river&max_tokens=6&temperature=0"
TEXT = expected_text("river", 6)


class KeyedApp:
    """An App whose key file holds alice's and bob's keys, and calls made with them."""

    def __init__(self, app: LiveApp, file: Path, secrets: dict[str, str]) -> None:
        self.app = app
        self.file = file
        self.secrets = secrets

    def headers(self, name: str | None) -> dict[str, str]:
        return {} if name is None else {"authorization": f"Bearer {self.secrets[name]}"}

    async def call(self, name: str | None, method: str, path: str, body: Any = None, **options: Any) -> Exchange:
        headers = self.headers(name) | options.pop("headers", {})
        return await call(self.app.asgi, method, path, body, headers=headers, **options)

    async def create(self, name: str) -> dict[str, Any]:
        answer = await self.call(name, "POST", "/v1/streams", BODY)
        assert answer.status == 201, answer.body
        created: dict[str, Any] = answer.json()
        return created

    async def ticket(self, name: str) -> str:
        answer = await self.call(name, "POST", "/v1/stream/tickets")
        assert answer.status == 201, answer.body
        assert answer.json().keys() == {"ticket", "expires_in_s"}
        assert answer.json()["expires_in_s"] == TICKET_TTL_S
        assert answer.headers["cache-control"] == "no-store"
        ticket: str = answer.json()["ticket"]
        return ticket

    async def open(self, query: str, headers: dict[str, str] | None = None) -> Exchange:
        """GET /v1/stream as a page does: without a key."""
        return await call(self.app.asgi, "GET", "/v1/stream", query=query, headers=SSE | (headers or {}))


@asynccontextmanager
async def keyed_app(tmp_path: Path, **options: Any) -> AsyncIterator[KeyedApp]:
    file = tmp_path / "keys.toml"
    secrets = {}
    for name in ("alice", "bob"):
        secrets[name], entry = create_key(name)
        append_key(file, entry)
    async with live_app(api_keys_file=file, **options) as app:
        yield KeyedApp(app, file, secrets)


def assert_unauthorized(answer: Exchange, code: str = "invalid_api_key") -> None:
    assert answer.status == 401, answer.body
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def text_of(answer: Exchange) -> str:
    tokens = [event["data"] for event in answer.events() if event.get("event") == "token"]
    return "".join(json.loads(data)["text"] for data in tokens)


async def test_every_route_needs_a_key_but_those_listed_open(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        open_ones = set()
        for route in keyed.app.asgi.routes:
            path = route.path.replace("{id}", "x")  # type: ignore[attr-defined]
            for method in (route.methods or set()) if isinstance(route, Route) else {"GET"}:
                answer = await keyed.call(None, method, path, BODY, headers=SSE)
                if answer.status != 401:
                    open_ones.add(f"{method} {path}")
        assert {name for name in open_ones if not name.startswith("HEAD ")} == {
            "GET /",
            "GET /classify",
            "GET /docs",
            "GET /dashboard",
            "GET /health",
            "GET /health_generate",
            "GET /ready",
            "GET /v1/streams/x/events",
        }
        assert (await keyed.call(None, "GET", "/static/chat.js")).status == 200
        assert (await keyed.call(None, "GET", "/v1/streams/x/events")).status == 404
        for name in ("alice", "bob"):
            assert (await keyed.call(name, "POST", "/v1/completions", BODY)).status == 200
            assert (await keyed.call(name, "GET", "/v1/models")).status == 200
            assert (await keyed.call(name, "GET", "/metrics")).status == 200


async def test_a_key_is_asked_for_before_the_body_is_read(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        request = exchange(keyed.app.asgi, "POST", "/v1/completions")
        request.send_body(b"{", more_body=True)
        await request.run()
        assert_unauthorized(request)
        assert request.headers["connection"] == "close"
        metrics = (await keyed.call("alice", "GET", "/metrics")).body.decode()
        assert 'headrace_requests_rejected_total{status="401"} 1.0' in metrics


async def test_metrics_are_open_where_that_is_set(tmp_path: Path) -> None:
    async with keyed_app(tmp_path, open_metrics=True) as keyed:
        assert (await keyed.call(None, "GET", "/metrics")).status == 200
        assert_unauthorized(await keyed.call(None, "GET", "/v1/models"))


async def test_a_key_in_the_url_is_no_key(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        for name in ("api_key", "key", "x-api-key", "authorization", "access_token"):
            query = f"{name}={keyed.secrets['alice']}"
            assert_unauthorized(await keyed.call(None, "GET", "/v1/models", query=query))
            assert_unauthorized(await keyed.open(f"{QUERY}&{name}={keyed.secrets['alice']}"))


async def test_with_keys_neither_host_nor_origin_matters(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        for headers in ({"host": "chat.example"}, {"host": "["}, {"origin": "http://evil.example"}):
            assert (await keyed.call("alice", "POST", "/v1/completions", BODY, headers=headers)).status == 200
            assert (await keyed.call("alice", "GET", "/v1/none", headers=headers)).status == 404
            assert (await keyed.call("alice", "GET", "/v1/models/", headers=headers)).status == 404
            assert_unauthorized(await keyed.call(None, "POST", "/v1/completions", BODY, headers=headers))


async def test_a_page_of_another_origin_asks_first_without_a_key_and_can_read_a_refusal(tmp_path: Path) -> None:
    origin = "https://chat.example"
    asking = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    async with keyed_app(tmp_path, cors_origins=origin) as keyed:
        preflight = await keyed.call(None, "OPTIONS", "/v1/completions", headers=asking)
        assert preflight.status == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in preflight.headers
        refused = await keyed.call(None, "POST", "/v1/completions", BODY, headers={"origin": origin})
        assert_unauthorized(refused)
        assert refused.headers["access-control-allow-origin"] == origin
        # Asking is all that is open, and only to the origins that are listed.
        assert_unauthorized(await keyed.call(None, "OPTIONS", "/v1/completions"))
        foreign = await keyed.call(None, "OPTIONS", "/v1/models", headers=asking | {"origin": "https://evil.example"})
        assert foreign.status == 400


async def test_a_stream_is_read_by_its_id_and_managed_by_its_owner_only(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed, anyio.create_task_group() as tasks:
        with keyed.app.runner.held():
            stream = await keyed.create("alice")
            for method in ("GET", "DELETE"):
                for_nobody = await keyed.call(None, method, stream["url"])
                assert_unauthorized(for_nobody)
                for_bob = await keyed.call("bob", method, stream["url"])
                unknown = await keyed.call("bob", method, f"/v1/streams/{'0' * 32}")
                assert (for_bob.status, for_bob.json()) == (404, unknown.json())
            reader = exchange(keyed.app.asgi, "GET", stream["events_url"], headers=SSE)
            tasks.start_soon(reader.run)
        await reader.done.wait()
        assert text_of(reader) == TEXT, "nobody else could end it"
        assert (await keyed.call("alice", "GET", stream["url"])).json()["text"] == TEXT
        assert (await keyed.call("alice", "DELETE", stream["url"])).status == 200
        with keyed.app.runner.held():
            running = await keyed.create("bob")
            cancelled = await keyed.call("bob", "DELETE", running["url"])
        assert cancelled.json()["finish_reason"] == "cancelled"


async def test_of_a_stream_that_is_gone_only_its_owner_hears(tmp_path: Path) -> None:
    async with keyed_app(tmp_path, stream_ttl_s=0) as keyed:
        stream = await keyed.create("alice")
        await call(keyed.app.asgi, "GET", stream["events_url"], headers=SSE)
        await keyed.app.until(lambda: stream["id"] not in keyed.app.registry._finished)
        assert (await keyed.call("alice", "GET", stream["url"])).status == 410
        assert (await keyed.call("bob", "GET", stream["url"])).status == 404


async def test_tenants_do_not_find_each_others_prompts_in_the_cache(tmp_path: Path) -> None:
    body = BODY | {"prompt": "x" * 40}

    async with keyed_app(tmp_path) as keyed:

        async def num_cached(name: str) -> int:
            answer = await keyed.call(name, "POST", "/v1/completions", body)
            num: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return num

        assert [await num_cached(name) for name in ("alice", "alice", "bob", "bob")] == [0, 32, 0, 32]
        # By ticket too one is who one is.
        query = f"prompt={'y' * 40}&max_tokens=1"
        for _ in range(2):
            await keyed.open(f"{query}&ticket={await keyed.ticket('alice')}")
        body["prompt"] = "y" * 40
        assert [await num_cached(name) for name in ("bob", "alice")] == [0, 32]


async def test_get_stream_takes_a_key_or_a_ticket(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        assert_unauthorized(await keyed.open(QUERY))
        assert_unauthorized(await keyed.open(f"{QUERY}&ticket="), "invalid_ticket")
        assert_unauthorized(await keyed.open(f"{QUERY}&ticket=guessed"), "invalid_ticket")
        assert text_of(await keyed.open(QUERY, keyed.headers("bob"))) == TEXT
        opened = await keyed.open(f"{QUERY}&ticket={await keyed.ticket('alice')}")
        assert text_of(opened) == TEXT
        id = opened.events()[-1]["id"].split(":")[0]
        assert (await keyed.call("alice", "GET", f"/v1/streams/{id}")).status == 200
        assert (await keyed.call("bob", "GET", f"/v1/streams/{id}")).status == 404


async def test_a_ticket_starts_one_stream_and_resumes_it_from_then_on(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed:
        query = f"{QUERY}&ticket={await keyed.ticket('alice')}"
        first = await keyed.open(query)
        again = await keyed.open(query)
        assert text_of(again) == text_of(first) == TEXT
        assert again.events()[-1] == first.events()[-1], "the same stream"
        token = next(event for event in first.events() if event.get("event") == "token")
        rest = await keyed.open(query, {"last-event-id": token["id"]})
        assert text_of(rest) == TEXT[int(token["id"].split(":")[1]) :]
        over = await keyed.open(query, {"last-event-id": first.events()[-1]["id"]})
        assert over.status == 204
        assert b"headrace_prompt_tokens_total 5.0" in keyed.app.client.metrics.expose(), "generated once"


async def test_a_ticket_shown_twice_at_once_starts_one_stream(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed, anyio.create_task_group() as tasks:
        query = f"{QUERY}&ticket={await keyed.ticket('alice')}"
        readers = [exchange(keyed.app.asgi, "GET", "/v1/stream", query=query, headers=SSE) for _ in range(5)]
        for reader in readers:
            tasks.start_soon(reader.run)
        for reader in readers:
            await reader.done.wait()
            assert text_of(reader) == TEXT
        assert len({reader.events()[-1]["id"] for reader in readers}) == 1


async def test_a_ticket_is_not_spent_by_a_refusal_or_by_a_server_that_is_full(tmp_path: Path) -> None:
    async with keyed_app(tmp_path, max_queue_size=1, scheduler=make_scheduler(max_num_seqs=1)) as keyed:
        ticket = await keyed.ticket("alice")
        with keyed.app.runner.held():
            await keyed.create("alice")
            keyed.app.runner.allow(1)
            await keyed.app.until(lambda: keyed.app.client.num_waiting == 0)
            await keyed.create("alice")
            full = await keyed.open(f"{QUERY}&ticket={ticket}")
            assert (full.status, [list(event) for event in full.events()]) == (200, [["retry"]])
        await keyed.app.until(lambda: keyed.app.client.num_waiting == 0)
        assert (await keyed.open(f"prompt=&ticket={ticket}")).status == 400
        assert text_of(await keyed.open(f"{QUERY}&ticket={ticket}")) == TEXT


async def test_a_client_that_leaves_before_its_stream_has_started_can_show_its_ticket_again(tmp_path: Path) -> None:
    async with keyed_app(tmp_path) as keyed, anyio.create_task_group() as tasks:
        query = f"{QUERY}&ticket={await keyed.ticket('alice')}"
        leaving = exchange(keyed.app.asgi, "GET", "/v1/stream", query=query, headers=SSE)
        leaving.disconnect()
        tasks.start_soon(leaving.run)
        await leaving.done.wait()
        assert text_of(await keyed.open(query)) == TEXT


async def test_tickets_work_the_same_without_keys_but_are_not_asked_for() -> None:
    async with live_app() as app:
        ticket = (await call(app.asgi, "POST", "/v1/stream/tickets")).json()["ticket"]
        for query in (QUERY, f"{QUERY}&ticket={ticket}"):
            assert text_of(await call(app.asgi, "GET", "/v1/stream", query=query, headers=SSE)) == TEXT
        wrong = await call(app.asgi, "GET", "/v1/stream", query=f"{QUERY}&ticket=x", headers=SSE)
        assert_unauthorized(wrong, "invalid_ticket")


async def test_reading_the_file_again_lets_new_keys_in_and_revoked_ones_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with keyed_app(tmp_path) as keyed:
        ticket, started = await keyed.ticket("alice"), await keyed.create("alice")
        carol, entry = create_key("carol")
        keyed.file.write_text(entry.as_toml())
        keyed.app.reload_keys()
        assert (await keyed.call(None, "GET", "/v1/models", headers={"x-api-key": carol})).status == 200
        assert_unauthorized(await keyed.call("alice", "GET", "/v1/models"))
        assert_unauthorized(await keyed.open(f"{QUERY}&ticket={ticket}"), "invalid_ticket")
        # What was started is finished.
        assert text_of(await call(keyed.app.asgi, "GET", started["events_url"], headers=SSE)) == TEXT
        keyed.file.write_text(f'[[keys]]\nname = "eve"\nsha256 = "{carol}"\n')
        keyed.app.reload_keys()
        assert (await keyed.call(None, "GET", "/v1/models", headers={"x-api-key": carol})).status == 200
    assert "the keys stay as they were" in caplog.text
    assert carol not in caplog.text


async def test_no_line_of_the_log_holds_a_key_or_a_ticket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with keyed_app(tmp_path) as keyed:
        ticket = await keyed.ticket("alice")
        await keyed.open(f"{QUERY}&ticket={ticket}")
        await keyed.open(f"prompt=&ticket={ticket}x")
        await keyed.call("alice", "POST", "/v1/completions", {"prompt": ""})
        await keyed.call(None, "GET", "/v1/models", headers={"x-api-key": keyed.secrets["bob"] + "x"})
    lines = [record for record in caplog.records if record.name == "headrace.requests"]
    assert len(lines) == 4
    for secret in (ticket, *keyed.secrets.values()):
        assert secret not in caplog.text
