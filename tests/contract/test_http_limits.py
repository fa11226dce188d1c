"""What a connection may cost, over real sockets: a head's size, the time it takes, a client that reads nothing."""

import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc
import h11
import pytest
import uvicorn

from fake_engine import expected_text
from headrace.server import http_protocol
from headrace.server.connection_limit import ConnectionLimit
from headrace.server.http_protocol import HttpProtocol, watch_peers
from live_app import LiveApp, live_app

pytestmark = pytest.mark.anyio

OK = {"prompt": "hi", "max_tokens": 4, "temperature": 0}
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


class Listening:
    """An App behind uvicorn, and connections to it."""

    def __init__(self, app: LiveApp, server: uvicorn.Server, port: int) -> None:
        self.app = app
        self.server = server
        self._port = port

    async def connect(self) -> anyio.abc.SocketStream:
        return await anyio.connect_tcp("127.0.0.1", self._port)

    async def answer(self, request: bytes) -> bytes:
        """All that comes back for these bytes until the server closes."""
        async with await self.connect() as connection:
            await connection.send(request)
            return await read_to_end(connection)


@asynccontextmanager
async def listening(
    peer_timeout_s: float = 60, buffer_bytes: int | None = None, **flags: Any
) -> AsyncIterator[Listening]:
    with socket.socket() as listener:
        if buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        async with live_app(**flags) as app, anyio.create_task_group() as tasks:
            settings = app.settings.model_copy(update={"peer_timeout_s": peer_timeout_s})
            limit = ConnectionLimit(settings.max_connections, app.metrics)
            protocol: Any = partial(HttpProtocol, settings, limit, app.report_refusal)
            server = uvicorn.Server(uvicorn.Config(app.asgi, http=protocol, lifespan="off", log_config=None))
            tasks.start_soon(server.serve, [listener])
            await app.until(lambda: server.started)
            yield Listening(app, server, listener.getsockname()[1])
            server.should_exit = True


async def read_to_end(connection: anyio.abc.SocketStream) -> bytes:
    received = b""
    with anyio.fail_after(20):
        try:
            while True:
                received += await connection.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received


def post(body: Any, *, head: bytes = b"") -> bytes:
    payload = json.dumps(body).encode()
    start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return start + head + b"content-length: %d\r\n\r\n" % len(payload) + payload


UNREAD = b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999\r\n\r\n" + b"x" * 100


@pytest.mark.parametrize(
    "request_line",
    [b"GET /health", b"GET /", b"POST /", b"GET /no/such", b"POST /v1/stream/tickets", b"GET /v1/models"],
)
async def test_a_body_that_nobody_reads_ends_its_connection(
    request_line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_LINGER_S", 0.05)
    async with listening() as server:
        assert b"HTTP/1.1 " in await server.answer(request_line + UNREAD)


@pytest.mark.parametrize("request_line", [b"POST /v1/stream/tickets", b"GET /v1/models"])
async def test_a_body_that_comes_after_its_answer_leaves_the_connection_to_the_next_request(
    request_line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_LINGER_S", 0.05)
    async with listening() as server, await server.connect() as connection:
        await connection.send(request_line + b" HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n")
        assert (await connection.receive()).startswith(b"HTTP/1.1 20")
        with server.app.runner.held():
            await connection.send(b"{}" + post(OK | {"stream": True}, head=b"connection: close\r\n"))
            await server.app.until(lambda: server.app.client.num_unfinished == 1)
            # One that began to linger later than this one is closed when this one would be, or after.
            assert b"HTTP/1.1 " in await server.answer(b"GET /health" + UNREAD)
        assert (await read_to_end(connection)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_get_whose_body_cannot_be_read_is_refused_once_and_starts_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = b" HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    async with listening() as server:
        for path in (b"/v1/models", b"/health", b"/metrics", b"/v1/stream?prompt=hi"):
            assert_refused(await server.answer(b"GET " + path + broken + b"zz\r\n"), 400)
        metrics = await server.answer(HEALTH.replace(b"/health", b"/metrics") + b"connection: close\r\n\r\n")
        assert server.app.runner.num_steps == 0
        assert server.app.client.num_unfinished == 0
    assert b'headrace_requests_rejected_total{status="400"} 4.0' in metrics
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_request_whose_body_cannot_be_read_does_not_reach_the_application() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with listening() as server:
        server.server.config.loaded_app = app
        assert_refused(await server.answer(HEALTH + b"transfer-encoding: chunked\r\n\r\nzz\r\n"), 400)
        assert reached == []
        await server.answer(HEALTH + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n")
        assert reached == ["/health"]


async def test_bodies_that_are_being_received_are_bounded_together_and_one_alone_is_not() -> None:
    large = post(OK | {"user": "x" * 400}, head=b"connection: close\r\n")
    async with listening(max_queue_bytes=400) as server:
        [route] = [route for route in server.app.asgi.routes if getattr(route, "path", "") == "/v1/completions"]
        receiving = route.endpoint._receiving  # type: ignore[attr-defined]
        for _ in range(2):
            async with await server.connect() as first, await server.connect() as second:
                await first.send(large[:-200])
                await server.app.until(lambda: receiving._num_bytes > 200)
                await second.send(large[:-200])
                refused = await read_to_end(second)
                assert_refused(refused, 503)
                assert b'"code":"overloaded"' in refused
                assert b"\r\nretry-after: 1\r\n" in refused
                await first.send(large[-200:])
                assert expected_text("hi", 4).encode() in await read_to_end(first)
            assert receiving._num_bytes == 0


async def test_a_body_with_two_lengths_is_refused_and_refusals_are_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="headrace.requests")
    async with listening() as server:
        two = b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        assert_refused(await server.answer(HEALTH + two), 400)
        await server.answer(HEALTH.replace(b"/health", b"/nope") + b"connection: close\r\n\r\n")
        metrics = await server.answer(HEALTH.replace(b"/health", b"/metrics") + b"connection: close\r\n\r\n")
    for status in (b"400", b"404"):
        assert b'headrace_requests_rejected_total{status="%b"} 1.0' % status in metrics
    records = [record for record in caplog.records if record.name == "headrace.requests"]
    assert [json.loads(record.getMessage())["finish_reason"] for record in records] == ["refused: 400", "refused: 404"]


def assert_refused(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"\r\nconnection: close" in head.lower()
    assert b"\r\nx-request-id: " in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEALTH + b"x: " + b"y" * 2000 + b"\r\n\r\n",
        HEALTH + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
        HEALTH + b"x: " + b"y" * 200_000,
        b"GET /health?" + b"y" * 2000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"y" * 200_000,
        HEALTH + b"".join(b"x%d: y\r\n" % i for i in range(100)) + b"\r\n",
    ],
    ids=["one header", "one huge header", "one endless header", "the path", "no line at all", "many headers"],
)
async def test_a_head_over_the_limit_is_431(request_bytes: bytes) -> None:
    async with listening(max_header_bytes=1500) as server:
        assert_refused(await server.answer(request_bytes), 431)
        assert (await server.answer(HEALTH + b"connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_head_at_the_limit_is_served() -> None:
    many = b"".join(b"x%d: y\r\n" % i for i in range(98))
    long = b"x: " + b"y" * 60_000 + b"\r\n"
    async with listening() as server:
        for headers in (many, long):
            assert (await server.answer(HEALTH + headers + b"connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (HEALTH + b"x y: z\r\n\r\n", 400),
        (HEALTH + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
        (HEALTH + b"content-length: -1\r\n\r\n", 400),
        (HEALTH + b"transfer-encoding: gzip\r\n\r\n", 501),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_what_is_no_http_is_refused_in_the_envelope(request_bytes: bytes, status: int) -> None:
    async with listening() as server:
        assert_refused(await server.answer(request_bytes), status)


async def answer_to_a_trickle(connection: anyio.abc.SocketStream) -> bytes:
    while True:
        await connection.send(b"x")
        with anyio.move_on_after(0.02):
            return await connection.receive()


async def test_a_head_that_trickles_is_408_however_steadily_it_comes() -> None:
    async with listening(receive_timeout_s=0.3) as server, await server.connect() as connection:
        await connection.send(HEALTH + b"x: ")
        assert_refused(await answer_to_a_trickle(connection), 408)


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with listening(receive_timeout_s=0.1) as server:
        assert await server.answer(b"") == b""


async def test_a_second_head_on_a_connection_has_its_time_too() -> None:
    async with listening(receive_timeout_s=0.3) as server, await server.connect() as connection:
        await connection.send(HEALTH + b"\r\n")
        assert (await connection.receive()).endswith(b'{"status":"ok","step_age_s":0.0}')
        await connection.send(HEALTH)
        assert_refused(await read_to_end(connection), 408)


async def test_a_body_that_trickles_is_408_however_steadily_it_comes() -> None:
    async with listening(receive_timeout_s=0.3) as server, await server.connect() as connection:
        await connection.send(post({"prompt": "x" * 10_000})[:-9_000])
        assert_refused(await answer_to_a_trickle(connection), 408)
        assert server.app.runner.num_steps == 0


async def test_an_answer_may_take_longer_than_its_request_may() -> None:
    async with listening(receive_timeout_s=0.1) as server, await server.connect() as connection:
        with server.app.runner.held():
            await connection.send(post(OK, head=b"connection: close\r\n"))
            await server.app.until(lambda: server.app.client.num_unfinished == 1)
            assert await server.answer(b"") == b"", "one that came later is cut off already"
        assert expected_text("hi", 4).encode() in await read_to_end(connection)


async def test_a_chunked_body_over_the_limit_is_413_before_it_ends() -> None:
    async with listening(max_body_bytes=1000) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        request = head + b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (600, b" " * 600) * 2
        assert_refused(await server.answer(request), 413)


async def test_what_breaks_off_in_the_middle_of_an_answer_ends_it_and_nothing_else() -> None:
    async with listening() as server:
        with server.app.runner.held():
            async with await server.connect() as connection:
                # The body has ended, so what follows is a second request, and none.
                await connection.send(post(OK | {"stream": True, "max_tokens": 400}) + b"\x00\x01\r\n\r\n")
                await server.app.until(lambda: server.app.client.num_unfinished == 1)
        await server.app.until(lambda: server.app.client.num_unfinished == 0)
        assert (await server.answer(post(OK, head=b"connection: close\r\n"))).startswith(b"HTTP/1.1 200")


async def test_a_client_that_reads_nothing_is_cut_off_and_its_generation_with_it() -> None:
    async with listening(peer_timeout_s=0.2, buffer_bytes=4096) as server:
        app = server.app
        usage = {"include_usage": True, "continuous_usage_stats": True}
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setblocking(False)
            await anyio.to_thread.run_sync(client.connect_ex, ("127.0.0.1", server._port))
            await anyio.wait_writable(client)
            with app.runner.held():
                client.send(post(OK | {"max_tokens": 500, "stream": True, "stream_options": usage}))
                await app.until(lambda: app.client.num_unfinished == 1)
                [generation] = app.client._generations.values()
                [connection] = server.server.server_state.connections
                while not connection.flow.write_paused:  # type: ignore[union-attr]
                    seen = app.client.load.num_steps
                    app.runner.allow(1)
                    await app.until(lambda seen=seen: app.client.load.num_steps > seen)  # type: ignore[misc]
                await app.until(lambda: generation.is_over)
                app.runner.allow(1)
        assert generation.log.terminal is not None
        assert generation.log.terminal.finish_reason.value == "cancelled"


async def test_where_every_connection_is_in_use_another_is_told_and_probes_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_protocol, "_PLACELESS_TIMEOUT_S", 0.1)
    async with listening(max_connections=1) as server, await server.connect() as connection:
        app = server.app
        with app.runner.held():
            await connection.send(post(OK | {"stream": True}, head=b"connection: close\r\n"))
            await app.until(lambda: app.client.num_unfinished == 1)
            refused = await server.answer(post(OK))
            assert_refused(refused, 503)
            assert b"\r\nretry-after: 1\r\n" in refused
            assert b'"code":"too_many_connections"' in refused
            for probe in (b"/health", b"/ready"):
                head = HEALTH.replace(b"/health", probe) + b"connection: close\r\n\r\n"
                assert (await server.answer(head)).startswith(b"HTTP/1.1 200")
            assert await server.answer(b"") == b"", "without a place one has little time"
            assert_refused(await server.answer(HEALTH), 408)
        assert (await read_to_end(connection)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert expected_text("hi", 4).encode() in await server.answer(post(OK, head=b"connection: close\r\n"))


@pytest.mark.parametrize("authority", ["http://localhost", "HTTPS://elsewhere.example:1"])
async def test_a_target_with_scheme_and_host_is_its_path(authority: str) -> None:
    async with listening() as server:
        for path, status in (("/health", 200), ("/health?a=http://b/c", 200), ("", 200), ("?a=/x", 200), ("/no", 404)):
            target = f"{authority}{path}".encode()
            answer = await server.answer(HEALTH.replace(b"/health", target) + b"connection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 %d" % status), (target, answer)
        one_zero = HEALTH.replace(b"/health", authority.encode() + b"/health").replace(b"HTTP/1.1", b"HTTP/1.0")
        assert b"\r\n\r\n" in await server.answer(one_zero + b"\r\n"), "which ends by itself"


async def test_without_a_place_one_gets_one_answer_and_an_event_source_gets_one_that_brings_it_back() -> None:
    page = "https://chat.example"
    async with listening(max_connections=1, cors_origins=page) as server, await server.connect() as connection:
        with server.app.runner.held():
            await connection.send(post(OK | {"stream": True}))
            await server.app.until(lambda: server.app.client.num_unfinished == 1)
            answer = await server.answer(3 * (HEALTH + b"\r\n"))
            assert answer.count(b"HTTP/1.1 200") == answer.lower().count(b"connection: close") == 1
            preflight = HEALTH.replace(b"GET /health", b"OPTIONS /v1/completions")
            preflight += b"origin: %b\r\naccess-control-request-method: POST\r\n\r\n" % page.encode()
            assert (await server.answer(3 * preflight)).count(b"HTTP/1.1 200") == 1
            accept = b"accept: text/event-stream\r\norigin: %b\r\n" % page.encode()
            for path in (b"/v1/stream?prompt=hi", b"/v1/streams/x/events"):
                asked = HEALTH.replace(b"/health", path) + accept + b"\r\n"
                head, _, body = (await server.answer(asked)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                assert b"connection: close" in head.lower()
                assert b"content-type: text/event-stream" in head
                assert b"access-control-allow-origin: %b" % page.encode() in head
                assert b"retry: 1000\n\n" in body
            assert_refused(await server.answer(post(OK, head=accept)), 503)


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_client_that_closes_its_sending_side_has_left(*, is_streamed: bool) -> None:
    async with listening() as server, await server.connect() as connection:
        app = server.app
        with app.runner.held():
            await connection.send(post(OK | {"stream": is_streamed}))
            await app.until(lambda: app.client.num_unfinished == 1)
            [generation] = app.client._generations.values()
            await connection.send_eof()
            await app.until(lambda: generation.is_over)
        assert generation.log.terminal is not None
        assert generation.log.terminal.finish_reason.value == "cancelled"
        assert b"[DONE]" not in await read_to_end(connection)


async def test_a_connection_and_its_stream_are_freed_when_they_end_without_a_garbage_collector() -> None:
    alive: list[weakref.ref[Any]] = []
    async with listening() as server:
        gc.collect()
        gc.disable()
        try:
            for request in (post(OK | {"stream": True}, head=b"connection: close\r\n"), post(OK)):
                async with await server.connect() as connection:
                    with server.app.runner.held():
                        await connection.send(request)
                        await server.app.until(lambda: server.app.client.num_unfinished == 1)
                        alive += [weakref.ref(protocol) for protocol in server.server.server_state.connections]
                        alive += [weakref.ref(each.log) for each in server.app.client._generations.values()]
                    while not (await connection.receive()).endswith((b"0\r\n\r\n", b"}}")):
                        pass
            await server.app.until(lambda: not server.server.server_state.connections)
            await anyio.wait_all_tasks_blocked()
            assert len(alive) == 4
            assert [reference() for reference in alive] == [None] * 4
        finally:
            gc.enable()


@pytest.mark.parametrize("method", [b"HEAD", b"POST"])
async def test_chunks_are_taken_only_by_a_response_that_has_them(method: bytes) -> None:
    taken: dict[str, bool] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        write_chunk = scope["extensions"]["headrace.write_chunk"]
        taken["before the head"] = write_chunk(b"x")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"transfer-encoding: chunked")]})
        taken["an empty one"] = write_chunk(b"")
        taken["one of a body"] = write_chunk(b"abc")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        taken["after the end"] = write_chunk(b"x")

    async with listening() as server:
        server.server.config.loaded_app = app
        answer = await server.answer(HEALTH.replace(b"GET", method) + b"connection: close\r\n\r\n")
    is_body = method == b"POST"
    expected = {"before the head": False, "an empty one": False, "one of a body": is_body, "after the end": False}
    assert taken == expected
    assert answer.partition(b"\r\n\r\n")[2] == (b"3\r\nabc\r\n0\r\n\r\n" if is_body else b"")


async def test_a_streamed_body_is_framed_as_http_says_on_a_connection_that_goes_on_and_for_a_client_of_1_0() -> None:
    """Read by h11, whose client side refuses what is no HTTP."""
    stream = OK | {"stream": True, "max_tokens": 40}
    bodies = []
    async with listening() as server:
        async with await server.connect() as connection:
            reader = h11.Connection(h11.CLIENT)
            for _ in range(2):
                bodies.append(await streamed_body(connection, reader, stream))
                reader.start_next_cycle()
        old = post(stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        head, _, body = (await server.answer(old)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    texts = [
        "".join(json.loads(frame[6:])["choices"][0]["text"] for frame in each.split(b"\n\n")[:-2])
        for each in (*bodies, body)
    ]
    assert texts == [expected_text("hi", 40)] * 3
    assert all(each.endswith(b"data: [DONE]\n\n") for each in (*bodies, body))


async def streamed_body(connection: anyio.abc.SocketStream, reader: h11.Connection, body: Any) -> bytes:
    headers = [("host", "localhost"), ("content-type", "application/json"), ("transfer-encoding", "chunked")]
    for event in (
        h11.Request(method="POST", target="/v1/completions", headers=headers),
        h11.Data(data=json.dumps(body).encode()),
        h11.EndOfMessage(),
    ):
        await connection.send(reader.send(event) or b"")
    received = b""
    with anyio.fail_after(20):
        while not isinstance(read := reader.next_event(), h11.EndOfMessage):
            if read is h11.NEED_DATA:
                reader.receive_data(await connection.receive())
            elif isinstance(read, h11.Data):
                received += bytes(read.data)
    return received


@pytest.mark.parametrize(("timeout_s", "idle_s", "interval_s"), [(60, 30, 10), (4, 1, 1), (3600, 1800, 600)])
async def test_an_accepted_connection_asks_after_its_peer(timeout_s: int, idle_s: int, interval_s: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        watch_peers(listener, timeout_s)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            names = {"TCP_KEEPIDLE": idle_s, "TCP_KEEPINTVL": interval_s, "TCP_KEEPCNT": 3}
            names["TCP_USER_TIMEOUT"] = timeout_s * 1000
            for name, value in names.items():
                if hasattr(socket, name):
                    assert accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name
