"""Who gets past the loopback guard: three closures instead of a server."""

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from headrace.server.guard import LoopbackGuard

pytestmark = pytest.mark.anyio

OWN = "127.0.0.1:8000"


def ignore(status: int) -> None: ...


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
