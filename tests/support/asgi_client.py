"""Calling an ASGI app without sockets: a request as a `receive` under the test's control, a response as a list."""

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Exchange:
    """One request in flight. `await done.wait()` for its end; `disconnect()` hangs up as a client does."""

    app: ASGIApp
    scope: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    done: anyio.Event = field(default_factory=anyio.Event)
    changed: anyio.Event = field(default_factory=anyio.Event)
    reader: Callable[[Message], Awaitable[None]] | None = None  # takes its time with a message

    def __post_init__(self) -> None:
        self._incoming_send, self._incoming = anyio.create_memory_object_stream[Message](1000)

    async def run(self) -> None:
        try:
            await self.app(self.scope, self._incoming.receive, self._send)
        finally:
            self._incoming.close()
            self._incoming_send.close()
            self.done.set()
            self._notify()

    def send_body(self, chunk: bytes, *, more_body: bool = False) -> None:
        self._incoming_send.send_nowait({"type": "http.request", "body": chunk, "more_body": more_body})

    def disconnect(self) -> None:
        self._incoming_send.send_nowait({"type": "http.disconnect"})

    async def wait_until(self, predicate: Any) -> None:
        """Wait until `predicate()` holds, looking again after every message."""
        while not predicate():
            await self.changed.wait()

    async def _send(self, message: Message) -> None:
        self.messages.append(message)
        self._notify()
        if self.reader is not None:
            await self.reader(message)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.messages if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        start = next(m for m in self.messages if m["type"] == "http.response.start")
        return {name.decode().lower(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] == "http.response.body")

    @property
    def is_complete(self) -> bool:
        return any(m["type"] == "http.response.body" and not m.get("more_body") for m in self.messages)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[dict[str, str]]:
        return list(parse_events(self.body))


def exchange(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    query: str = "",
    headers: dict[str, str] | None = None,
) -> Exchange:
    """A request that has not started; run it in a task group, and feed its body."""
    all_headers = {"host": "127.0.0.1:8000", "content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in all_headers.items()],
        "client": ("127.0.0.1", 12345),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    return Exchange(app, scope)


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    query: str = "",
    headers: dict[str, str] | None = None,
) -> Exchange:
    """A whole request and its whole response. `body` is bytes, or an object to send as JSON."""
    request = exchange(app, method, path, query=query, headers=headers)
    request.send_body(body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode())
    await request.run()
    return request


def with_state(app: ASGIApp) -> ASGIApp:
    """An app for the transports of HTTP clients, which leave out what servers put into a scope."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {}}, receive, send)

    return run


def parse_events(body: bytes) -> Iterator[dict[str, str]]:
    """Server-sent events as dictionaries of their fields; comments are skipped."""
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            yield fields


def chunks(body: bytes) -> list[dict[str, Any]]:
    """The JSON chunks of a stream that ended well."""
    assert body.endswith(b"data: [DONE]\n\n")
    frames = body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]
