"""The answers to bytes that may be no HTTP, read off a bare socket.

Sending stops where the server has answered, as real clients do: it need not read what it refuses. Blocks the thread
that asks.
"""

import json
import re
import select
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=60)


def exchange(url: str, request: bytes, num_answers: int) -> list[Answer]:
    """Send bytes and read so many answers, fewer where the server closes first; none of 0 are waited for."""
    with connect(url) as connection:
        if num_answers == 0:
            connection.sendall(request)
            return []
        received, unsent = b"", memoryview(request)
        while True:
            [readable, writable, _] = select.select([connection], [connection] if unsent else [], [], 60)
            assert readable or writable, f"no answer to {request[:200]!r}"
            if readable:
                try:
                    chunk = connection.recv(2**16)
                except ConnectionResetError:
                    chunk = b""
                received += chunk
                answers = parse_answers(received, is_closed=not chunk)
                if not chunk or len(answers) >= num_answers:
                    return answers
            elif len(parse_answers(received, is_closed=False)) < num_answers:
                try:
                    unsent = unsent[connection.send(unsent[: 2**18]) :]
                except (BrokenPipeError, ConnectionResetError):
                    unsent = unsent[:0]


def parse_answers(received: bytes, *, is_closed: bool) -> list[Answer]:
    """The whole answers in what came; one that only the connection's end makes whole counts with `is_closed`."""
    answers = []
    while received:
        head, separator, rest = received.partition(b"\r\n\r\n")
        if not separator:
            break
        head += b"\r\n"
        status = int(head[9:12])
        if status in (100, 204, 304):
            num_bytes = 0
        elif (length := _LENGTH.search(head)) is not None:
            num_bytes = int(length[1])
        elif _CHUNKED in head.lower() and (end := rest.find(b"0\r\n\r\n")) >= 0:
            num_bytes = end + 5
        else:
            num_bytes = len(rest) + 1
        if num_bytes > len(rest) and not is_closed:
            break
        answers.append(Answer(status, head, rest[:num_bytes]))
        received = rest[num_bytes:]
    return answers
