"""What http_bench counts, and what it calls a failure, before a socket that plays the server."""

import socket
from collections.abc import Iterator

import pytest

from headrace.benchmarks.http_bench import Readers, Reading, _mean, _percentile

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"9\r\ndata: 1\n\n\r\n"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    connections: list[socket.socket] = []
    yield connections
    for connection in connections:
        connection.close()


def answered(listener: socket.socket, answer: bytes, connections: list[socket.socket]) -> Readers:
    """Two streams that have been opened, each of which has been sent `answer`; theirs are the connections."""
    readers = Readers(listener.getsockname()[1], 2)
    readers.open("/v1/completions", {"stream": True})
    connections += [listener.accept()[0] for _ in range(2)]
    for connection in connections:
        assert connection.recv(1 << 16).endswith(b'{"stream": true}')
        connection.sendall(answer)
    return readers


def test_events_of_all_streams_are_counted(listener: socket.socket, connections: list[socket.socket]) -> None:
    readers = answered(listener, HEAD + 3 * CHUNK, connections)
    readers.read_for(0.05)
    assert readers.num_events == 2 * 3
    readers.close()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n", "refused a stream"),
        (HEAD + CHUNK + b"0\r\n\r\n", "ended a stream"),
    ],
)
def test_a_stream_that_is_refused_or_ends_is_no_measurement(
    listener: socket.socket, connections: list[socket.socket], answer: bytes, complaint: str
) -> None:
    readers = answered(listener, answer, connections)
    with pytest.raises(ConnectionError, match=complaint):
        readers.read_for(0.5)
    readers.close()


def test_figures_are_of_what_was_observed_in_between() -> None:
    before = {"x_sum": 1.0, "x_count": 10.0, 'x_bucket{le="0.1"}': 9.0, 'x_bucket{le="1.0"}': 10.0}
    after = {"x_sum": 3.0, "x_count": 110.0, 'x_bucket{le="0.1"}': 99.0, 'x_bucket{le="1.0"}': 110.0}
    assert _mean(before, after, "x") == 2.0 / 100
    assert _percentile(before, after, "x", 0.9) == 0.1
    assert _percentile(before, after, "x", 0.99) == 1.0


def test_the_cost_of_a_token_is_that_of_both_threads() -> None:
    reading = Reading(1.0, 1000, 900, 90_000, {"loop": 0.012, "engine": 0.003}, {}, {})
    assert reading.us_per_token == pytest.approx(15.0)
