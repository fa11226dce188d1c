"""Streams through Debian's nginx, with the site that configs/nginx.conf shows."""

import json
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import h2.connection
import h2.errors
import h2.events
import httpx
import pytest

from asgi_client import parse_events
from headrace.server.settings import Settings
from nginx_process import SERVER_NAME, SITE, Nginx, nginx
from raw_client import RawRequest
from server_process import ServerProcess, serving
from waiting import until

LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "stream": True}
NUM_EVENTS = 40


@pytest.fixture(scope="module")
def upstream(demo_model: Path) -> Iterator[ServerProcess]:
    with serving(
        *("--batch-invariant", "--kv-cache-bytes", "512MiB", "--allowed-hosts", json.dumps([SERVER_NAME]))
    ) as process:
        yield process


@pytest.fixture(scope="module")
def proxy(upstream: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    port = urlsplit(upstream.url()).port
    assert port is not None
    with nginx(tmp_path_factory.mktemp("nginx"), port) as proxy:
        yield proxy


def client_of(proxy: Nginx, *, http2: bool) -> httpx.Client:
    return httpx.Client(
        base_url=proxy.url,
        verify=proxy.certificate.trusted(),
        http1=not http2,
        http2=http2,
        headers={"host": SERVER_NAME, "accept-encoding": "gzip"},
        timeout=60,
    )


@pytest.fixture(params=["HTTP/1.1", "HTTP/2"])
def client(proxy: Nginx, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with client_of(proxy, http2=request.param == "HTTP/2") as client:
        assert client.get("/health").http_version == request.param
        yield client


def _is_idle(server: ServerProcess) -> bool:
    metrics = server.metrics()
    is_free = metrics["headrace_kv_cache_free_blocks"] == metrics["headrace_kv_cache_total_blocks"]
    return metrics["headrace_num_requests_running"] == 0 and is_free


def _num_cancelled(server: ServerProcess) -> float:
    return server.metrics()['headrace_requests_finished_total{finished_reason="cancelled"}']


def test_tokens_arrive_one_by_one_and_a_client_that_leaves_cancels(
    upstream: ServerProcess, client: httpx.Client
) -> None:
    num_cancelled = _num_cancelled(upstream)
    with client.stream("POST", "/v1/completions", json=LONG) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-encoding" not in response.headers
        assert len(response.headers["x-request-id"]) == 32
        num_reads, received = 0, b""
        chunks = response.iter_raw()  # held, for the connection closes with it
        for chunk in chunks:
            num_reads += 1
            received += chunk
            if received.count(b"data: ") >= NUM_EVENTS:
                break
        # A proxy that buffers passes some fifty events at a time; a machine that is busy joins a few.
        assert num_reads >= NUM_EVENTS / 4
        assert upstream.metrics()["headrace_num_requests_running"] == 1, "the rest is still to come"
    client.close()  # httpx lets go of an HTTP/2 stream without a word: see the next test
    until(lambda: _is_idle(upstream), "the generation ends with its client")
    assert _num_cancelled(upstream) == num_cancelled + 1


def test_a_browser_that_resets_an_http2_stream_cancels_and_keeps_its_connection(
    upstream: ServerProcess, proxy: Nginx
) -> None:
    with Http2Connection(proxy) as connection:
        left, other = connection.post("/v1/completions", LONG), connection.post("/v1/completions", LONG)
        connection.read_until(lambda received: all(b"data: " in received[stream] for stream in (left, other)))
        assert upstream.metrics()["headrace_num_requests_running"] == 2
        connection.reset(left)
        until(lambda: upstream.metrics()["headrace_num_requests_running"] == 1, "one ends with its stream")
        num_received = len(connection.received[other])
        connection.read_until(lambda received: len(received[other]) > num_received)
    until(lambda: _is_idle(upstream), "the other ends with the connection")


class Http2Connection:
    """HTTP/2 as a browser speaks it, which lets go of one stream by resetting it."""

    def __init__(self, proxy: Nginx) -> None:
        parts = urlsplit(proxy.url)
        tls = proxy.certificate.trusted()
        tls.set_alpn_protocols(["h2"])
        plain = socket.create_connection((parts.hostname, parts.port), timeout=60)
        self._socket = tls.wrap_socket(plain, server_hostname=parts.hostname)
        self._h2 = h2.connection.H2Connection()
        self._h2.initiate_connection()
        self.received: defaultdict[int, bytes] = defaultdict(bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def post(self, path: str, body: Any) -> int:
        """Send a request; returns its stream's number."""
        stream = self._h2.get_next_available_stream_id()
        head = {":method": "POST", ":scheme": "https", ":authority": SERVER_NAME, ":path": path}
        self._h2.send_headers(stream, list((head | {"content-type": "application/json"}).items()))
        self._h2.send_data(stream, json.dumps(body).encode(), end_stream=True)
        self._flush()
        return stream

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    def read_until(self, predicate: Callable[[Mapping[int, bytes]], bool]) -> None:
        while not predicate(self.received):
            received = self._socket.recv(65536)
            assert received, "nginx closed the connection"
            for event in self._h2.receive_data(received):
                if isinstance(event, h2.events.DataReceived):
                    assert event.data is not None
                    self.received[event.stream_id] += event.data
            self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self._h2.data_to_send())


@pytest.mark.parametrize("hang_up", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_whose_connection_breaks_cancels(
    upstream: ServerProcess, proxy: Nginx, stream: bool, hang_up: str
) -> None:
    body = dict(LONG, stream=stream)
    request = RawRequest(proxy.url, "/v1/completions", body, tls=proxy.certificate.trusted(), host=SERVER_NAME)
    until(lambda: upstream.metrics()["headrace_num_requests_running"] == 1, "it runs")
    getattr(request, hang_up)()
    until(lambda: _is_idle(upstream), "the generation ends with its client")


def test_an_event_source_resumes_where_its_connection_broke(client: httpx.Client) -> None:
    body = {"prompt": "The history of water mills", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    url = client.post("/v1/streams", json=body).json()["events_url"]
    text, last_event_id, num_connections = "", "", 0
    while True:
        num_connections += 1
        events = _read_events(client, url, last_event_id, stop_after=10 if num_connections < 3 else 1000)
        for event in events:
            last_event_id = event["id"]
            text += json.loads(event["data"]).get("text", "")
        if events[-1]["event"] == "done":
            break
    assert num_connections == 3
    assert text == whole


def _read_events(client: httpx.Client, url: str, last_event_id: str, stop_after: int) -> list[dict[str, str]]:
    """What a connection brings until it ends, or is broken off after so many events."""
    headers = {"accept": "text/event-stream", "last-event-id": last_event_id}
    with client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200
        received = b""
        for chunk in response.iter_raw():
            received += chunk
            if received.count(b"\n\nid: ") >= stop_after:
                break
    whole, _, _ = received.rpartition(b"\n\n")
    return [event for event in parse_events(whole) if "id" in event]


def test_http2_carries_more_streams_than_browsers_open_connections(upstream: ServerProcess, proxy: Nginx) -> None:
    with client_of(proxy, http2=True) as client, ExitStack() as streams:
        for _ in range(8):
            response = streams.enter_context(client.stream("POST", "/v1/completions", json=LONG))
            next(response.iter_raw())
        assert upstream.metrics()["headrace_num_requests_running"] == 8
    until(lambda: _is_idle(upstream), "all end with their client")


def test_the_page_and_its_own_origin_pass_and_others_do_not(client: httpx.Client) -> None:
    assert "<html" in client.get("/").text
    body = {"prompt": "a", "max_tokens": 1}
    assert client.post("/v1/completions", json=body, headers={"origin": f"https://{SERVER_NAME}"}).status_code == 200
    assert client.post("/v1/completions", json=body, headers={"origin": "https://evil.example"}).status_code == 403
    for path in ("/metrics", "/dashboard", "/admin/stacks", "/%61dmin/requests"):
        assert client.get(path).status_code == 404, path
        assert "nginx" in client.get(path).text, "not even asked for"


def test_what_is_too_large_is_refused_in_words_that_clients_read(proxy: Nginx) -> None:
    body = {"prompt": "x" * (4 * 2**20 + 1)}
    # Over HTTP/2 httpx would go on sending, and not look at the answer.
    with client_of(proxy, http2=False) as client:
        answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_prompt_of_many_kilobytes_fits_into_the_url(client: httpx.Client) -> None:
    params: dict[str, str | int] = {"prompt": "long " * 1800, "max_tokens": 1}
    answer = client.get("/v1/stream", params=params, headers={"accept": "text/event-stream"})
    assert answer.status_code == 200
    assert "event: done" in answer.text


def test_plain_http_is_sent_to_https(proxy: Nginx) -> None:
    answer = httpx.get(f"{proxy.plain_url}/v1/models", headers={"host": SERVER_NAME})
    assert (answer.status_code, answer.headers["location"]) == (301, f"https://{SERVER_NAME}/v1/models")


def test_while_the_server_is_away_clients_are_told_to_come_back(tmp_path: Path) -> None:
    with nginx(tmp_path, upstream_port=1) as proxy, client_of(proxy, http2=True) as client:
        answer = client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_sites_limits_stand_in_the_order_that_its_comments_say() -> None:
    settings: Any = Settings()
    site = SITE.read_text()

    def number(directive: str) -> int:
        [found] = re.findall(rf"^ *{directive} (?:\d+ )?(\d+)[smk]?;", site, flags=re.MULTILINE)
        return int(found)

    assert number("keepalive_timeout") < settings.keep_alive_s
    assert number("proxy_read_timeout") > max(settings.heartbeat_s, settings.request_timeout_s)
    assert number("client_max_body_size") * 2**20 == settings.max_body_bytes
