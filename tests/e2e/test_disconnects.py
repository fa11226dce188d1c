"""A client that leaves takes its sequence along, whatever the server was doing for it: over real sockets."""

from collections.abc import Iterator

import httpx
import pytest

from raw_client import RawRequest
from server_process import ServerProcess, serving
from waiting import until

LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def small(demo_model: object) -> Iterator[ServerProcess]:
    """A server that runs two sequences at a time, so that a third one queues."""
    flags = ["--kv-cache-bytes", "512MiB", "--max-num-seqs", "2", "--max-num-batched-tokens", "32"]
    # Two, however long a step takes on a busy machine.
    flags += ["--itl-targets-ms=1e6,1e6,1e6", "--ttft-targets-s=1e6,1e6,1e6"]
    with serving("--batch-invariant", *flags) as process:
        yield process


def _load(server: ServerProcess) -> tuple[float, float, float, float]:
    metrics = server.metrics()
    total = metrics["headrace_kv_cache_total_blocks"]
    return (
        metrics["headrace_num_requests_running"],
        metrics["headrace_num_requests_waiting"],
        total - metrics["headrace_kv_cache_free_blocks"],
        metrics['headrace_requests_finished_total{finished_reason="cancelled"}'],
    )


def _cancelled(server: ServerProcess, phase: str) -> float:
    return server.metrics()[f'headrace_requests_cancelled_total{{phase="{phase}"}}']


def _assert_nothing_left(server: ServerProcess) -> None:
    until(lambda: _load(server)[:3] == (0, 0, 0), "running, waiting and held blocks are zero")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions?stream"])
@pytest.mark.parametrize("hang_up", ["close", "reset"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_in_mid_generation_frees_its_blocks(
    small: ServerProcess, path: str, hang_up: str, phase: str
) -> None:
    body = dict(LONG, stream=path.endswith("stream"))
    if phase == "prefill":
        body |= {"prompt": "word " * 6000}
    before = _cancelled(small, phase)
    request = RawRequest(small.url(), "/v1/completions", body)
    until(lambda: _load(small)[0] == 1 and _load(small)[2] > 0, "the request runs")
    if phase == "decode":
        steps = small.metrics()["headrace_generation_tokens_total"]
        until(lambda: small.metrics()["headrace_generation_tokens_total"] > steps + 2, "tokens come")
    getattr(request, hang_up)()
    _assert_nothing_left(small)
    assert _cancelled(small, phase) == before + 1


def test_a_client_that_leaves_while_queued_never_runs(small: ServerProcess) -> None:
    with RawRequest(small.url(), "/v1/completions", LONG) as a, RawRequest(small.url(), "/v1/completions", LONG) as b:
        until(lambda: _load(small)[0] == 2, "two run")
        before = _cancelled(small, "queued")
        queued = RawRequest(small.url(), "/v1/completions", dict(LONG, stream=True))
        until(lambda: _load(small)[1] == 1, "one waits")
        queued.close()
        until(lambda: _load(small)[1] == 0, "nobody waits")
        assert _cancelled(small, "queued") == before + 1
        assert _load(small)[0] == 2, "the others run on"
        a.close()
        b.close()
    _assert_nothing_left(small)


def test_a_client_that_leaves_in_its_body_starts_nothing(small: ServerProcess) -> None:
    before = _cancelled(small, "body")
    accepted = small.metrics()["headrace_prompt_tokens_total"]
    RawRequest(small.url(), "/v1/completions", LONG, num_body_bytes=20).close()
    until(lambda: _cancelled(small, "body") == before + 1, "counted")
    assert small.metrics()["headrace_prompt_tokens_total"] == accepted
    _assert_nothing_left(small)


def test_a_client_that_reads_nothing_is_noticed_when_it_leaves(small: ServerProcess) -> None:
    request = RawRequest(small.url(), "/v1/completions", dict(LONG, stream=True))
    until(lambda: _load(small)[0] == 1, "it runs")
    request.close()
    _assert_nothing_left(small)


def test_a_client_that_leaves_with_a_second_request_in_the_pipe_is_noticed(small: ServerProcess) -> None:
    with RawRequest(small.url(), "/v1/completions", dict(LONG, stream=True)) as request:
        request.socket.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        until(lambda: _load(small)[0] == 1, "it runs")
    _assert_nothing_left(small)
    assert "Traceback" not in small.output


def test_a_client_that_offers_http2_gets_its_answer(small: ServerProcess) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    with RawRequest(small.url(), "/health") as request:
        request.read_until(b"ok")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: Upgrade, HTTP2-Settings\r\n"
        head += b"upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\ncontent-type: application/json\r\n"
        request.received = b""
        request.socket.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        request.read_until(b'"finish_reason"')


def test_endless_headers_are_cut_off(small: ServerProcess) -> None:
    with RawRequest(small.url(), "/health") as request:
        request.read_until(b"ok")
        with pytest.raises(ConnectionError):
            request.socket.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 2**26)
    assert httpx.get(f"{small.url()}/health").status_code == 200


def test_a_client_that_leaves_at_its_last_token_leaves_nothing(small: ServerProcess) -> None:
    for max_tokens in (1, 2, 3):
        for _ in range(5):
            with RawRequest(small.url(), "/v1/completions", dict(LONG, stream=True, max_tokens=max_tokens)) as request:
                request.read_until(b'"finish_reason":"length"')
    _assert_nothing_left(small)


def test_a_native_stream_without_readers_ends_after_its_grace_time(server: ServerProcess) -> None:
    before = _load(server)[3]
    stream = httpx.post(f"{server.url()}/v1/streams", json=LONG).json()
    with RawRequest(server.url(), stream["events_url"]) as reader:
        reader.read_until(b"event: token")
    assert httpx.get(server.url() + stream["url"]).json()["status"] == "running"
    until(lambda: _load(server)[3] == before + 1, "cancelled after the grace time")
    assert httpx.get(server.url() + stream["url"]).json()["finish_reason"] == "cancelled"
    _assert_nothing_left(server)


def test_cancelled_streams_leave_no_descriptor_or_thread(small: ServerProcess) -> None:
    def leave_ten() -> None:
        requests = [RawRequest(small.url(), "/v1/completions", dict(LONG, stream=True)) for _ in range(10)]
        requests[0].read_until(b"data:")
        for request in requests:
            request.reset()
        _assert_nothing_left(small)

    leave_ten()  # worker threads start once
    before = small.num_descriptors(), small.num_threads()
    leave_ten()
    until(lambda: (small.num_descriptors(), small.num_threads()) <= before, "descriptors and threads are back")
