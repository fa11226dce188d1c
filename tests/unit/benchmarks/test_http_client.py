"""The HTTP client: one exchange over a fake transport, its response cut at every place."""

import asyncio

import pytest

from headrace.benchmarks.http_client import Connection, HttpEnd, Target

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
    b"6\r\ndata: \r\n4;note=x\r\na\n\nb\r\n0\r\n\r\n"
)
MEASURED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: a\n\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED


class FakeTransport(asyncio.Transport):
    """Keeps what is written; closes when told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self._is_closed = True

    def is_closing(self) -> bool:
        return self._is_closed


def exchange(*reads: bytes, lost: Exception | None = None) -> tuple[HttpEnd, bytes, bool]:
    """Run one exchange whose response comes in these reads, before the connection is lost."""

    async def run() -> tuple[HttpEnd, bytes, bool]:
        connection, body = Connection(), bytearray()
        connection.connection_made(FakeTransport())
        pending = asyncio.ensure_future(connection.exchange(b"GET", lambda _status, chunk, _now_s: body.extend(chunk)))
        await asyncio.sleep(0)
        for read in reads:
            connection.data_received(read)
        is_reusable = connection.is_reusable
        connection.connection_lost(lost)
        return await pending, bytes(body), is_reusable

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("response", "status", "body", "is_reusable"),
    [
        pytest.param(CHUNKED, 200, b"data: a\n\nb", True, id="chunked"),
        pytest.param(MEASURED, 429, b"busy", True, id="content-length"),
        pytest.param(UNTIL_CLOSE, 200, b"data: a\n\n", False, id="until close"),
        pytest.param(INTERIM, 200, b"data: a\n\nb", True, id="after an interim response"),
    ],
)
def test_a_response_cut_anywhere_is_read_whole(response: bytes, status: int, body: bytes, is_reusable: bool) -> None:
    for cut in range(len(response) + 1):
        end, got, reusable = exchange(response[:cut], response[cut:])
        assert (end.status, end.is_whole, got, reusable) == (status, True, body, is_reusable)


def test_a_chunked_body_without_its_last_chunk_is_not_whole() -> None:
    for cut in range(len(CHUNKED)):
        assert not exchange(CHUNKED[:cut])[0].is_whole


def test_a_reset_is_not_the_end_of_a_body_that_ends_by_close() -> None:
    assert not exchange(UNTIL_CLOSE, lost=ConnectionResetError())[0].is_whole


@pytest.mark.parametrize(
    ("header", "seconds"), [(b"", None), (b"Retry-After: 3\r\n", 3), (b"retry-after: Fri, 27 Nov 2026\r\n", None)]
)
def test_what_a_response_says_of_when_to_come_back_is_told(header: bytes, seconds: float | None) -> None:
    end, _, _ = exchange(b"HTTP/1.1 503 Service Unavailable\r\n" + header + b"Content-Length: 0\r\n\r\n")
    assert end.retry_after_s == seconds


def test_a_connection_lost_before_any_answer_has_no_status() -> None:
    end, _, _ = exchange()
    assert (end.status, end.has_answer_bytes, end.is_whole) == (0, False, False)


@pytest.mark.parametrize("nonsense", [b"SSH-2.0-OpenSSH_9\r\n", CHUNKED.replace(b"6\r\n", b"zz\r\n")])
def test_what_is_no_http_is_a_fault_and_drops_the_connection(nonsense: bytes) -> None:
    end, _, is_reusable = exchange(nonsense)
    assert end.fault
    assert not end.is_whole
    assert not is_reusable


def test_a_connection_lost_before_the_request_answers_at_once() -> None:
    async def run() -> HttpEnd:
        connection = Connection()
        connection.connection_made(FakeTransport())
        connection.connection_lost(None)
        return await connection.exchange(b"GET", lambda _status, _chunk, _now_s: None)

    assert not asyncio.run(run()).has_answer_bytes


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", Target("127.0.0.1", 8000, False, "")),
        ("http://127.0.0.1:8000/v1", Target("127.0.0.1", 8000, False, "")),
        ("http://gpu/v1/", Target("gpu", 80, False, "")),
        ("https://gpu/llm/v1", Target("gpu", 443, True, "/llm")),
        ("http://[::1]:9", Target("::1", 9, False, "")),
    ],
)
def test_a_base_url_is_read_with_or_without_v1(url: str, target: Target) -> None:
    assert Target.parse(url) == target


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://gpu", "http://", "http://gpu:99999", "http://gpu/a b"])
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Target.parse(url)


def test_the_host_header_brackets_an_ipv6_address() -> None:
    assert Target.parse("http://[::1]:9/x").authority == "[::1]:9"
    assert Target.parse("http://[::1]:9/x").url == "http://[::1]:9/x"
