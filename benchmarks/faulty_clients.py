"""Clients that do not behave: they leave when they like, or never read. Each has a connection of its own.

Runs on the event loop. Parsing is `http_client`'s; what the server makes of it is for the caller to find out.
"""

import asyncio
import contextlib
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Final, Self

from headrace.benchmarks.http_client import Connection, HttpEnd, Target

_TCP_CLOSE: Final = 7  # Linux's TCP_INFO: reset, or closed by both


def post(target: Target, path: str, body: dict[str, Any]) -> bytes:
    """Write a request."""
    payload = json.dumps(body).encode()
    return (
        _head("POST", target, path, f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n") + payload
    )


def get(target: Target, path: str, headers: str = "") -> bytes:
    """Write a request without a body."""
    return _head("GET", target, path, headers)


def _head(method: str, target: Target, path: str, headers: str) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nhost: {target.authority}\r\naccept: text/event-stream, */*\r\n"
        f"connection: close\r\n{headers}\r\n"
    ).encode()


@dataclass(slots=True)
class OpenRequest:
    """A request that has been sent, and what has come back so far; `piece_s` are the times of the reads."""

    sent_s: float
    body: bytearray = field(default_factory=bytearray)
    piece_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    _connection: Connection = field(default_factory=Connection)
    _exchange: asyncio.Task[HttpEnd] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def send(cls, target: Target, request: bytes) -> Self:
        """Raises: OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, target.host, target.port)
        opened = cls(time.monotonic(), _connection=connection)
        opened._exchange = asyncio.create_task(opened._run(request))
        return opened

    async def _run(self, request: bytes) -> HttpEnd:
        try:
            return await self._connection.exchange(request, self._take)
        finally:
            self.ended_s = time.monotonic()
            self._connection.close()
            self._changed.set()

    def _take(self, status: int, piece: bytes, read_s: float) -> None:
        self.body += piece
        self.piece_s.append(read_s)
        self._changed.set()

    async def until(self, marker: bytes, times: int = 1) -> None:
        """Wait until this has come so often, or the answer has ended."""
        while self.body.count(marker) < times and self.ended_s is None:
            self._changed.clear()
            await self._changed.wait()

    async def end(self, limit_s: float) -> HttpEnd | None:
        """Wait for the answer's end; None, and the connection closed, where it does not come in time."""
        assert self._exchange is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(self._exchange)
        await self.leave()
        return None

    async def leave(self) -> None:
        """Close the connection, whatever is under way."""
        assert self._exchange is not None
        self._connection.close()
        await self._exchange


class StoppedReader:
    """A client that asks and then reads nothing; its window is as small as the system has it."""

    def __init__(self, target: Target, request: bytes) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self._socket.connect((target.host, target.port))
        self._socket.sendall(request)

    @property
    def is_cut(self) -> bool:
        """Whether the server has given it up."""
        return self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE

    def close(self) -> None:
        self._socket.close()
