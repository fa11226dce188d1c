"""uvicorn's HTTP/1.1 protocol, bounded: how many connections, how large a request's head may be, how long it may take,
how long a client may read next to nothing. Lives on the event loop, one object per connection.

What is wrong before a request reaches the application is answered here, in the same envelope; what does not even read
is cut off. Of uvicorn's class it overrides the refusal of what is no HTTP, and listens to what the transport reports.
"""

import asyncio
import json
import re
import secrets
import socket
import ssl
import sys
import time
from typing import Any

import h11
from starlette.datastructures import MutableHeaders
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle
from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]  # what uvloop itself puts between a transport and TLS

from headrace.server.connection_limit import ConnectionLimit
from headrace.server.errors import envelope
from headrace.server.guard import NO_PLACE
from headrace.server.request_log import OnRejected
from headrace.server.settings import ListenerSettings
from headrace.server.sse import WRITE_CHUNK

_MAX_HEADERS = 100
_LINGER_S = 1.0
# What a client has to read of what waits for it in each `peer_timeout_s`.
_MIN_READ_BYTES = 1024
# How long a connection without a place may take to say what it wants, and to read the answer.
_PLACELESS_TIMEOUT_S = 5.0
_HANDSHAKE_TIMEOUT_S = 5.0
# Of TCP's keep-alive: so many probes without an answer, each after an equal part of half the time.
_NUM_PROBES = 3


class HttpProtocol(H11Protocol):
    """One connection of the many that share `limit`; `settings` has the other limits, `on_rejected` is told of every
    refusal. With `tls` it counts from before its handshake."""

    conn: "_BoundedConnection"

    def __init__(
        self,
        settings: ListenerSettings,
        limit: ConnectionLimit,
        on_rejected: OnRejected,
        tls: ssl.SSLContext | None = None,
        **uvicorn_arguments: Any,
    ) -> None:
        super().__init__(**uvicorn_arguments)
        self._on_rejected = on_rejected
        self._tls = tls
        self._settings = settings
        self._limit = limit
        self.conn = _BoundedConnection(settings.max_header_bytes)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._place_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin when a connection is accepted, with TLS once more when its handshake is done."""
        is_new, self.transport = self.transport is None, transport
        if is_new and not self._limit.open(self):
            transport.abort()
            return
        if is_new and not self._limit.has_place(self):
            self._place_timer = self.loop.call_later(_PLACELESS_TIMEOUT_S, self._end_placeless)
        if is_new and self._tls is not None:
            self._shake_hands(transport, self._tls)
            return
        super().connection_made(transport)
        self._whole_app = _with_chunks(self.app, transport, self.flow, self.conn)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        has_place = self._limit.find_place(self)
        self.app = self._whole_app if has_place else _without_place(self._whole_app)
        super().data_received(data)
        self._note_state()
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note_state()
        if self.conn.their_state is h11.SEND_BODY:
            # Answered without its body having been read, of which nobody knows when it will end. Not closed at once:
            # the client should find the answer, not a reset.
            self.loop.call_later(_LINGER_S, self._close_unread, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._limit.close(self)
        for timer in (self._head_timer, self._write_timer, self._place_timer):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_write(sys.maxsize)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    @property
    def is_writing(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def make_room(self) -> None:
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 could not read; uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        assert isinstance(error, h11.RemoteProtocolError)
        self._refuse(error.error_status_hint, str(error)[:200])

    def _shake_hands(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Have TLS between `transport` and this protocol, which then gets one that speaks it. The loop's server would
        do the same, but tell of a connection only afterwards, and a flood of silent ones would go uncounted."""
        done = self.loop.create_future()
        done.add_done_callback(self._note_handshake)
        protocol = SSLProtocol(
            self.loop,
            self,
            tls,
            done,
            server_side=True,
            ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=self._settings.peer_timeout_s,  # in which a slow client may read the last answer
        )
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def _note_handshake(self, done: asyncio.Future[None]) -> None:
        # A connection that ends meanwhile is no error, and `connection_lost` is for one that has begun.
        if done.exception() is not None or self.flow is None:
            self._limit.close(self)

    def _close_unread(self, cycle: RequestResponseCycle) -> None:
        """Close, unless the body of this cycle's request has come to its end after all."""
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def _note_state(self) -> None:
        self._limit.note(self, is_idle=self.conn.their_state is h11.IDLE)

    def _time_head(self) -> None:
        """Start the clock on a head that is under way, stop it once it is whole."""
        if self.conn.their_state is not h11.IDLE:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.receive_timeout_s, self._refuse_late_head)

    def _end_placeless(self) -> None:
        if self._limit.has_place(self):
            return
        if self.conn.their_state is h11.IDLE and not self.is_writing:
            self._refuse_late_head()
        else:
            self.transport.abort()

    def _refuse_late_head(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, "the request's headers took too long to arrive")
        else:
            self.transport.close()  # it never said anything

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer is under way, and has to end torn
            if self.cycle is not None:  # its request's body was what could not be read, and there is no more to say
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            id = secrets.token_hex(16)
            self._on_rejected(id, "", time.monotonic(), status)
            body = json.dumps(envelope(message, type="invalid_request_error")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                ("x-request-id", id),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _time_write(self, num_bytes_before: int) -> None:
        """Cut off a client that in all this time has read next to nothing; what waits for it is far more than that."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes > num_bytes_before - _MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._write_timer = self.loop.call_later(self._settings.peer_timeout_s, self._time_write, num_bytes)


def _without_place(app: Any) -> Any:
    """`app` on a connection without a place, which is told so, and whose first answer is the last."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        async def send_last(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        scope.setdefault("extensions", {})[NO_PLACE] = {}
        await app(scope, receive, send_last)

    return run


def _with_chunks(app: Any, transport: asyncio.Transport, flow: FlowControl, conn: "_BoundedConnection") -> Any:
    """`app`, which finds in its scope's extensions how to write a chunk past `send`. Knows nothing of the protocol
    object: a reference back to it would keep each connection until the garbage collector comes."""

    def write_chunk(chunk: bytes) -> bool:
        """Write a piece of a streamed body now; False where it takes `send`, which can wait, and knows what is over."""
        # An empty chunk would end the body.
        if not chunk or flow.write_paused or transport.is_closing() or not conn.is_sending_chunks:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True

    async def run(scope: Any, receive: Any, send: Any) -> None:
        if conn.their_state is not h11.ERROR:  # else it was refused before it could begin
            scope.setdefault("extensions", {})[WRITE_CHUNK] = write_chunk
            await app(scope, receive, send)

    return run


class _BoundedConnection(h11.Connection):
    """h11 bounds a head that is not whole yet; one that comes in a single piece may be larger.

    `is_sending_chunks` tells that the head of a response with a chunked body is written, and its end is not; an answer
    to HEAD has no body, whatever its head says.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_header_bytes = max_header_bytes
        self.is_sending_chunks = False
        self._is_head = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # h11 has an overload for each event
        output: bytes | None = super().send(event)
        if type(event) is h11.Response:
            is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in (output or b"").lower()
            self.is_sending_chunks = is_chunked and not self._is_head
        elif type(event) is not h11.Data:
            self.is_sending_chunks = False
        return output

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._is_head = event.method == b"HEAD"
            if event.http_version not in (b"1.0", b"1.1"):  # h11 takes any, HTTP/2's preface too
                raise h11.RemoteProtocolError("only HTTP/1.1 and 1.0 are spoken here", error_status_hint=505)
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # What a proxy took for the body's end may not be what this server takes for it (RFC 9112, 6.3).
                raise h11.RemoteProtocolError("both content-length and transfer-encoding", error_status_hint=400)
            num_bytes = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if len(event.headers) > _MAX_HEADERS or num_bytes > self._max_header_bytes:
                raise h11.RemoteProtocolError(
                    f"more than {_MAX_HEADERS} headers, or {self._max_header_bytes} bytes of them",
                    error_status_hint=431,
                )
            if not event.target.startswith(b"/"):
                return h11.Request(
                    method=event.method,
                    target=_origin_form(event.target),
                    headers=list(event.headers),
                    http_version=event.http_version,
                )
        return event


def _origin_form(target: bytes) -> bytes:
    """The path and query of a target that names scheme and host too, as proxies are asked and every server has to
    understand (RFC 9112, 3.2.2); other targets as they are. The Host header stays what guards look at."""
    match = re.fullmatch(rb"https?://[^/?]+(/[^?]*)?(\?.*)?", target, re.IGNORECASE)
    return target if match is None else (match[1] or b"/") + (match[2] or b"")


def watch_peers(listener: socket.socket, timeout_s: int) -> None:
    """Have the kernel end connections of peers that vanished; accepted sockets inherit what is set here.

    Where nothing is under way keep-alive probes find out, else it is data that nobody acknowledges.
    """
    interval_s = max(1, timeout_s // (2 * _NUM_PROBES))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": timeout_s - _NUM_PROBES * interval_s,
        "TCP_KEEPALIVE": timeout_s - _NUM_PROBES * interval_s,  # the same on macOS
        "TCP_KEEPINTVL": interval_s,
        "TCP_KEEPCNT": _NUM_PROBES,
        "TCP_USER_TIMEOUT": timeout_s * 1000,
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
