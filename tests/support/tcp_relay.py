"""A relay in front of a server that cuts connections on purpose, as a bad network does."""

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


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
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._is_cut = False
        self._frozen: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._sockets:
            _close(connection)
        for thread in self._threads:
            thread.join(timeout=10)

    def cut(self) -> None:
        """Cut every connection, and each new one at once."""
        self._is_cut = True
        for connection in list(self._sockets):
            _close(connection)

    def mend(self) -> None:
        self._is_cut = False

    def freeze(self) -> None:
        """Let nothing more through the connections there are, as if their peer had vanished; new ones work."""
        self._frozen.update(self._sockets)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                if self._is_cut:
                    _close(client)
                else:
                    # Not here: a browser also opens connections ahead of need, and sends nothing over them for long.
                    self._start(self._relay, client)

    def _relay(self, client: socket.socket) -> None:
        try:
            request = client.recv(65536)
            server = socket.create_connection(self._upstream)
            self._sockets.append(server)
            server.sendall(request)
        except OSError:  # cut meanwhile
            _close(client)
            return
        is_stream = request.startswith(b"GET /v1/stream")
        limit = self._cuts.pop(0) if is_stream and self._cuts else None
        self._start(self._pump, client, server, None)
        self._pump(server, client, limit)

    def _pump(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        num_passed = 0
        with suppress(OSError):
            while chunk := source.recv(65536 if limit is None else min(65536, limit - num_passed)):
                if source in self._frozen:
                    continue
                target.sendall(chunk)
                num_passed += len(chunk)
                if limit is not None and num_passed >= limit:
                    break
        _close(source)
        _close(target)


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
