"""A relay in front of a server that does to connections what a bad network does, on purpose.

Two threads per connection, one for each direction. It looks into a request's first bytes only, and changes none.
"""

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class Ending(StrEnum):
    """How a relay ends a connection by itself."""

    CUT = "cut"  # FIN to both sides
    RESET = "reset"  # RST to both sides
    HALF_CLOSE = "half-close"  # FIN in this direction; the other goes on


@dataclass(frozen=True, slots=True)
class Passage:
    """How one direction of a connection lets its bytes through: unless told otherwise all of them, at once."""

    segment_bytes: int = 65536
    pauses_s: tuple[float, ...] = (0.0,)  # before each segment, in turn
    freeze_after_bytes: int | None = None
    freeze_s: float = 0.0
    end_after_bytes: int | None = None
    ending: Ending = Ending.CUT


class TcpRelay:
    """Listens on a free port and passes bytes both ways.

    Of the connections that carry an event stream, the first is cut after `cut_after_bytes[0]` bytes of response, the
    next after `cut_after_bytes[1]`, and so on; the rest pass whole. Between `cut` and `mend` nothing passes at all, and
    what `freeze` catches stays connected and silent.
    """

    def __init__(self, upstream: str, cut_after_bytes: Sequence[int] = ()) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._cuts = list(cut_after_bytes)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._sockets: set[socket.socket] = set()
        self._is_cut = False
        self._is_over = threading.Event()
        self._frozen: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_over.set()
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(timeout=10)

    def cut(self) -> None:
        """Cut every connection, and each new one at once."""
        self._is_cut = True
        _end(Ending.CUT, *self._sockets.copy())

    def mend(self) -> None:
        self._is_cut = False

    def freeze(self) -> None:
        """Let nothing more through the connections there are, as if their peer had vanished; new ones work."""
        self._frozen.update(self._sockets)

    def passages(self, request: bytes) -> tuple[Passage, Passage]:
        """How a new connection lets through what its client sends, which begins like this, and what it receives."""
        if request.startswith(b"GET /v1/stream") and self._cuts:
            return Passage(), Passage(end_after_bytes=self._cuts.pop(0))
        return Passage(), Passage()

    def _accept(self) -> None:
        relays: list[threading.Thread] = []
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                # Not here: a browser also opens connections ahead of need, and sends nothing over them for long.
                relays = [relay for relay in relays if relay.is_alive()]
                relays.append(_started(self._relay, client))
        for relay in relays:
            relay.join(timeout=10)

    def _relay(self, client: socket.socket) -> None:
        # Sockets are closed here alone, when no other thread uses them: their numbers are soon those of others.
        with client, suppress(OSError):
            self._sockets.add(client)
            if not self._is_cut and (request := client.recv(65536, socket.MSG_PEEK)):
                with socket.create_connection(self._upstream) as server:
                    self._sockets.add(server)
                    if self._is_cut:
                        _end(Ending.CUT, client, server)
                    up, down = self.passages(request)
                    other = _started(self._pump, client, server, up)
                    self._pump(server, client, down)
                    other.join()
                    self._forget(server)
        self._forget(client)

    def _forget(self, connection: socket.socket) -> None:
        self._sockets.discard(connection)
        self._frozen.discard(connection)

    def _pump(self, source: socket.socket, target: socket.socket, passage: Passage) -> None:
        num_passed = 0
        freeze_after_bytes, limit = passage.freeze_after_bytes, passage.end_after_bytes
        pauses = itertools.cycle(passage.pauses_s)
        ending = Ending.CUT
        with suppress(OSError):
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while limit is None or num_passed < limit:
                most = passage.segment_bytes if limit is None else min(passage.segment_bytes, limit - num_passed)
                if not (chunk := source.recv(most)):
                    break
                if source in self._frozen:
                    continue
                self._is_over.wait(next(pauses))
                target.sendall(chunk)
                num_passed += len(chunk)
                if freeze_after_bytes is not None and num_passed >= freeze_after_bytes:
                    freeze_after_bytes = None
                    self._is_over.wait(passage.freeze_s)
            else:
                ending = passage.ending
            if ending is Ending.HALF_CLOSE:
                target.shutdown(socket.SHUT_WR)
                while source.recv(65536):
                    pass
        _end(ending, source, target)


def _started(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _end(ending: Ending, *connections: socket.socket) -> None:
    """Have both directions of connections end, and the threads that wait for them go on."""
    for connection in connections:
        with suppress(OSError):
            if ending is Ending.RESET:
                # Sent when the socket is closed; shutting down what is received wakes its reader and sends nothing.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RD)
            else:
                connection.shutdown(socket.SHUT_RDWR)
