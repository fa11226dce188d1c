"""One HTTP/1.1 exchange at a time on a raw transport, lean enough to share a machine with the server it measures.

Bytes are parsed where the event loop delivers them, with no task woken between, so an arrival time is that of the read.
httptools (llhttp) parses the head and the chunked body. Deliberately unknown here: redirects, proxies, compression,
cookies. The only clock is `time.monotonic`, the one every benchmark module uses.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

BodySink = Callable[[int, bytes, float], None]
"""Takes (status, body bytes, time of the read in seconds) once per piece of a response body."""

_SELF_DELIMITING: Final = (b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is; `prefix` is the path before `/v1`."""

    host: str
    port: int
    is_tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Read a base URL, with or without a trailing `/v1`.

        Raises:
            ValueError: it is no http or https URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://HOST[:PORT] or https://HOST[:PORT]")
        if not (parts.path.isascii() and parts.path.isprintable()) or " " in parts.path:
            raise ValueError("the path holds characters that must be percent-encoded")
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        return cls(parts.hostname, port, is_tls, parts.path.rstrip("/").removesuffix("/v1"))

    @property
    def authority(self) -> str:
        """The Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL, without `/v1` and without any user name it was given with."""
        return f"{'https' if self.is_tls else 'http'}://{self.authority}{self.prefix}"


@dataclass(frozen=True, slots=True)
class HttpEnd:
    """How an exchange ended. Status 0: no response head came; `fault` is set where what came was no HTTP.
    `retry_after_s` is what the response asks for."""

    status: int
    is_whole: bool
    has_answer_bytes: bool
    written_s: float
    fault: str = ""
    retry_after_s: float | None = None


class Connection(asyncio.Protocol):
    """One TCP connection. The on_ methods are called by httptools while it is fed."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._on_body: BodySink | None = None
        self._is_lost = False
        self.is_reusable = False
        self._read_s = 0.0
        self._begin_answer()

    def _begin_answer(self) -> None:
        self._status = 0
        self._is_whole = False
        self._has_answer_bytes = False
        self._ends_by_close = True  # until a header says where the body ends
        self._fault = ""
        self._retry_after_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing has closed it so far."""
        return not (self._is_lost or self._transport is None or self._transport.is_closing())

    async def exchange(self, request: bytes, on_body: BodySink) -> HttpEnd:
        """Write one request and feed its response body to `on_body` until the response or the connection ends."""
        self._begin_answer()
        self.is_reusable = False
        self._on_body = on_body
        self._ended = asyncio.get_running_loop().create_future()
        written_s = time.monotonic()
        if self.is_open:
            assert self._transport is not None
            self._transport.write(request)
            await self._ended
        return HttpEnd(
            self._status, self._is_whole, self._has_answer_bytes, written_s, self._fault, self._retry_after_s
        )

    def close(self) -> None:
        """Drop the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        self._read_s = time.monotonic()
        self._has_answer_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # our own bug, not the server's
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fault = str(error) or type(error).__name__
            self.is_reusable = False
            self.close()
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._ended is not None and not self._ended.done():
            self._is_whole = exc is None and self._status >= 200 and self._ends_by_close
            self._end()

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _SELF_DELIMITING:
            self._ends_by_close = False
        elif name == b"retry-after" and value.isdigit():  # a date is left to whoever's clock it is
            self._retry_after_s = float(value)

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None:
            self._on_body(self._status, body, self._read_s)

    def on_message_complete(self) -> None:
        if self._status < 200:  # an interim response; the real one follows
            self._status = 0
            self._ends_by_close = True
            return
        self._is_whole = True
        self.is_reusable = self._parser.should_keep_alive()
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


class HttpClient:
    """Opens connections to one target, and keeps idle ones where asked to."""

    def __init__(self, target: Target, api_key: str | None = None, is_keeping_alive: bool = False) -> None:
        self._target = target
        self._is_keeping_alive = is_keeping_alive
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if target.is_tls else None
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = (
            f"Host: {target.authority}\r\n{authorization}"
            f"Connection: {'keep-alive' if is_keeping_alive else 'close'}\r\n"
            "Accept: text/event-stream, application/json\r\nUser-Agent: headrace-bench\r\n"
        )

    async def exchange(self, method: str, path: str, body: bytes, on_body: BodySink) -> HttpEnd:
        """Send one request; a response that never came, or came in part, is told by the result.

        Raises:
            OSError: no connection could be opened.
        """
        head = f"{method} {self._target.prefix}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        request = head.encode("latin-1") + b"\r\n" + body
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                end = await self._exchange_on(connection, request, on_body)
                if end.has_answer_bytes:
                    return end
                break  # the server closed an idle connection while we wrote; a new one decides
        return await self._exchange_on(await self._connect(), request, on_body)

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._target.host, self._target.port, ssl=self._tls)
        return connection

    async def _exchange_on(self, connection: Connection, request: bytes, on_body: BodySink) -> HttpEnd:
        try:
            return await connection.exchange(request, on_body)
        finally:
            if self._is_keeping_alive and connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()
