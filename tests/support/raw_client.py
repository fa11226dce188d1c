"""HTTP over a bare socket, for clients that leave in the middle: httpx always reads what it asked for."""

import json
import socket
import ssl
import struct
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class RawRequest:
    """A connection that has sent `sent` and reads only when told to."""

    def __init__(
        self,
        url: str,
        path: str,
        body: Any = None,
        *,
        num_body_bytes: int | None = None,
        receive_bytes: int | None = None,
        host: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(60)
        self.socket.connect((parts.hostname, parts.port))
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=parts.hostname)
        method = "GET" if body is None else "POST"
        payload = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: {host or parts.netloc}\r\naccept: text/event-stream\r\n"
            f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + payload[:num_body_bytes])
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.socket.close()

    def read_until(self, marker: bytes) -> None:
        while marker not in self.received:
            chunk = self.socket.recv(65536)
            assert chunk, f"the server closed before {marker!r}: {self.received[-500:]!r}"
            self.received += chunk

    def read_to_end(self) -> bytes:
        while chunk := self.socket.recv(65536):
            self.received += chunk
        return self.received

    def close(self) -> None:
        """Hang up as a browser does: FIN."""
        self.socket.close()

    def reset(self) -> None:
        """Hang up as a crash does: RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
