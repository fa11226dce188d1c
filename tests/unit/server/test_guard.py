"""Who gets past the guards: three closures instead of a server."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from headrace.server.api_keys import ApiKeys, create_key
from headrace.server.guard import KeyGuard, LoopbackGuard

pytestmark = pytest.mark.anyio

OWN = "127.0.0.1:8000"


def ignore(*refusal: object) -> None: ...


async def ask(
    headers: list[tuple[str, str]], *, allowed_hosts: tuple[str, ...] = (), cors_origins: tuple[str, ...] = ()
) -> tuple[bool, list[Message]]:
    """(Whether the request reached the app, what was sent)."""
    reached: list[Scope] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope)
        assert receive is no_message, "a wrapped receive would hide disconnects"
        assert send is keep

    async def no_message() -> Message:
        raise AssertionError("the guard needs no body")

    async def keep(message: Message) -> None:
        sent.append(message)

    guard = LoopbackGuard(app, allowed_hosts=allowed_hosts, cors_origins=cors_origins, on_rejected=ignore)
    encoded = [(name.lower().encode(), text.encode("latin-1")) for name, text in headers]
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": encoded}
    await guard(scope, no_message, keep)
    assert not (reached and sent)
    return bool(reached), sent


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]", "[::1]:8000", "my.box", "MY.box:80"],
)
async def test_the_names_of_loopback_and_those_allowed_are_served(host: str) -> None:
    assert await ask([("host", host)], allowed_hosts=("My.Box",)) == (True, [])


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8000",
        "127.0.0.1@evil.example",
        "127.0.0.1:80@evil.example",
        "evil.example#127.0.0.1",
        "evil.example/127.0.0.1",
        "0.0.0.0",
        "127.0.0.2",
        "[::1",
        "[::2]",
        "::1",
        "other.my.box",
        "my.box.evil.example",
    ],
)
async def test_every_other_host_is_refused_with_the_envelope(host: str) -> None:
    reached, sent = await ask([("host", host)], allowed_hosts=("my.box",))
    assert not reached
    start, body = sent
    assert start["status"] == 403
    error = json.loads(body["body"])["error"]
    assert error["type"] == "permission_error"
    assert set(error) == {"message", "type", "param", "code"}


async def test_no_host_at_all_is_refused() -> None:
    assert not (await ask([]))[0]


@pytest.mark.parametrize(
    ("origin", "is_served"),
    [
        (f"http://{OWN}", True),
        (f"https://{OWN}", True),
        ("https://chat.example", True),
        ("http://chat.example", False),
        ("https://chat.example:8443", False),
        ("https://chat.example.evil.example", False),
        ("http://127.0.0.1", False),
        ("http://127.0.0.1:8001", False),
        ("http://localhost:8000", False),
        ("null", False),
        ("", False),
        ("http://[::1", False),
        (f"http://evil@{OWN}", False),
        (f"http://evil.example/{OWN}", False),
    ],
)
async def test_a_page_may_call_from_this_server_or_a_listed_origin(origin: str, is_served: bool) -> None:
    reached, _ = await ask([("host", OWN), ("origin", origin)], cors_origins=("https://chat.example",))
    assert reached == is_served


async def test_a_star_lets_pages_of_every_origin_in_but_no_other_host() -> None:
    assert (await ask([("host", OWN), ("origin", "http://evil.example")], cors_origins=("*",)))[0]
    assert not (await ask([("host", "evil.example"), ("origin", "http://x")], cors_origins=("*",)))[0]


async def test_a_refusal_repeats_only_the_beginning_of_what_it_was_sent() -> None:
    for headers in ([("host", "x" * 100_000)], [("host", OWN), ("origin", "http://" + "x" * 100_000)]):
        _, sent = await ask(headers)
        assert len(sent[1]["body"]) < 1000


async def test_the_lifespan_passes() -> None:
    passed: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope["type"])

    async def nothing(*_: Any) -> Any: ...

    guard = LoopbackGuard(app, allowed_hosts=(), cors_origins=(), on_rejected=ignore)
    await guard({"type": "lifespan"}, nothing, nothing)
    assert passed == ["lifespan"]


CLOSED = [
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/streams",
    "/v1/streams/x",
    "/metrics",
    "/metrics/load",
    "/none",
]
# What looks like an open path and is none.
CLOSED += ["", "//", "/healthy", "/health/", "/static", "/v1/stream/tickets", "/v1/stream/", "/v1/streams//events"]
CLOSED += ["/v1/streams/a/b/events", "/v1/streams/x/events/", "/x/v1/streams/x/events", "/v1/streams/x/events\n"]
OPEN = ["/", "/health", "/ready", "/static/chat.js", "/v1/stream", "/v1/streams/x/events"]


class Keyed:
    """A guard with two keys, and what got past it."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.alice, entry = create_key("alice")
        self.bob, other = create_key("bob")
        file = tmp_path / "keys.toml"
        file.write_text(entry.as_toml() + other.as_toml())
        self.rejected: list[tuple[object, ...]] = []
        defaults: dict[str, Any] = {"keys": ApiKeys(file), "has_open_metrics": False}
        self.guard = KeyGuard(
            self._app, on_rejected=lambda *refusal: self.rejected.append(refusal), **(defaults | options)
        )
        self.sent: list[Message] = []

    async def tenant(self, path: str, headers: dict[str, str] | None = None) -> str | None:
        """Whose the request was found to be, None where it did not pass."""
        self._reached: list[str] = []
        encoded = [(name.encode(), text.encode("latin-1")) for name, text in (headers or {}).items()]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": encoded, "state": {}}
        await self.guard(scope, self._no_message, self._keep)
        return self._reached[0] if self._reached else None

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert receive == self._no_message, "a wrapped receive would hide disconnects"
        self._reached.append(scope["state"]["tenant"])

    async def _no_message(self) -> Message:
        raise AssertionError("the guard needs no body")

    async def _keep(self, message: Message) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("path", CLOSED)
async def test_a_path_needs_a_key_unless_it_is_listed_open(tmp_path: Path, path: str) -> None:
    keyed = Keyed(tmp_path)
    assert await keyed.tenant(path) is None
    start, body = keyed.sent
    assert start["status"] == 401
    headers = {name.decode(): text.decode() for name, text in start["headers"]}
    assert headers["www-authenticate"] == "Bearer"
    assert headers["connection"] == "close", "the body was not read"
    assert len(headers["x-request-id"]) == 32
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    [(id, route, _, status)] = keyed.rejected
    assert (id, route, status) == (headers["x-request-id"], path, 401)
    assert await keyed.tenant(path, {"x-api-key": keyed.alice}) == "alice"


@pytest.mark.parametrize("path", OPEN)
async def test_an_open_path_needs_no_key_and_minds_no_wrong_one(tmp_path: Path, path: str) -> None:
    keyed = Keyed(tmp_path)
    assert await keyed.tenant(path) == ""
    assert await keyed.tenant(path, {"x-api-key": "wrong"}) == ""
    assert await keyed.tenant(path, {"x-api-key": keyed.bob}) == "bob"


async def test_metrics_are_open_where_the_operator_says_so(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, has_open_metrics=True)
    for path in ("/metrics", "/metrics/load"):
        assert await keyed.tenant(path) == ""
    assert await keyed.tenant("/metrics/x") is None


async def test_a_key_is_taken_as_bearer_or_as_x_api_key(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path)
    for headers in (
        {"authorization": f"Bearer {keyed.alice}"},
        {"authorization": f"bearer  {keyed.alice} "},
        {"x-api-key": keyed.alice},
        {"x-api-key": keyed.alice, "authorization": "Basic dXNlcjpwYXNz"},
        {"authorization": f"Bearer {keyed.alice}", "x-api-key": keyed.bob},
    ):
        assert await keyed.tenant("/v1/models", headers) == "alice"


async def test_a_wrong_key_is_refused_without_being_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    keyed = Keyed(tmp_path)
    wrong = f"{keyed.alice}-secret"
    for headers in (
        {"authorization": f"Bearer {wrong}"},
        {"authorization": wrong},
        {"authorization": f"Basic {keyed.alice}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer ", "x-api-key": keyed.alice},
        {"x-api-key": wrong},
        {"x-api-key": ""},
        {"x-api-key": keyed.alice[:-1]},
        {"x-api-key": "\xff" * 60_000},
        {"cookie": keyed.alice},
    ):
        assert await keyed.tenant("/v1/models", headers) is None
    said = caplog.text + repr(keyed.sent)
    assert keyed.alice not in said
    assert keyed.alice[:-1] not in said
    assert "secret" not in said


async def test_without_keys_everybody_passes_as_nobody(tmp_path: Path) -> None:
    keyed = Keyed(tmp_path, keys=None)
    for path in [*CLOSED, *OPEN]:
        assert await keyed.tenant(path, {"x-api-key": "whatever"}) == ""
