"""When a connection's patience with its reader ends: a transport, and a clock that only counts."""

from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from headrace.server.connection_limit import ConnectionLimit
from headrace.server.http_protocol import HttpProtocol
from headrace.server.metrics import RequestMetrics
from headrace.server.settings import load_settings


class Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Timer:
        self.timers.append(Timer(lambda: callback(*args)))
        return self.timers[-1]

    def pass_time(self) -> None:
        """Let every timer that is set go off."""
        timers, self.timers = self.timers, []
        for timer in timers:
            if not timer.is_cancelled:
                timer.call()


class Transport:
    num_bytes = 0
    is_aborted = False

    def get_extra_info(self, name: str) -> None: ...

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.is_aborted = True


class Busy:
    """A connection that never makes room."""

    is_writing = True

    def make_room(self) -> None: ...


def connect(limit: ConnectionLimit) -> tuple[HttpProtocol, Transport, Loop]:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    loop, transport = Loop(), Transport()
    config = uvicorn.Config(app, log_config=None)
    settings = load_settings([], {})
    protocol = HttpProtocol(
        settings, limit, lambda *refusal: None, config=config, server_state=ServerState(), app_state={}, _loop=loop
    )
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol, transport, loop


@pytest.fixture
def connection() -> tuple[HttpProtocol, Transport, Loop]:
    protocol, transport, loop = connect(ConnectionLimit(1, RequestMetrics()))
    loop.timers.clear()  # of the head, which is not looked at here
    return protocol, transport, loop


@pytest.mark.parametrize("has_place", [False, True])
def test_who_has_no_place_and_leaves_an_answer_unread_is_cut_off_unless_there_is_a_place_by_then(
    *, has_place: bool
) -> None:
    limit, busy = ConnectionLimit(1, RequestMetrics()), Busy()
    assert limit.open(busy)
    protocol, transport, loop = connect(limit)
    transport.num_bytes = 1
    loop.timers.pop()  # of the head
    if has_place:
        limit.close(busy)
        assert limit.find_place(protocol)
    loop.pass_time()
    assert transport.is_aborted != has_place


def test_a_reader_that_reads_nothing_is_cut_off(connection: tuple[HttpProtocol, Transport, Loop]) -> None:
    protocol, transport, loop = connection
    transport.num_bytes = 70_000
    protocol.pause_writing()
    assert not transport.is_aborted
    loop.pass_time()
    assert transport.is_aborted


def test_a_slow_reader_is_waited_for_while_it_reads(connection: tuple[HttpProtocol, Transport, Loop]) -> None:
    protocol, transport, loop = connection
    transport.num_bytes = 70_000
    protocol.pause_writing()
    for _ in range(10):
        transport.num_bytes -= 1024
        loop.pass_time()
        assert not transport.is_aborted
    transport.num_bytes -= 1023
    loop.pass_time()
    assert transport.is_aborted


def test_a_reader_that_has_caught_up_is_not_watched(connection: tuple[HttpProtocol, Transport, Loop]) -> None:
    protocol, transport, loop = connection
    transport.num_bytes = 70_000
    protocol.pause_writing()
    protocol.resume_writing()
    loop.pass_time()
    assert not transport.is_aborted
    protocol.pause_writing()
    loop.pass_time()
    assert transport.is_aborted
