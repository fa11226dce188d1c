"""Two hundred streams at once, merged into one running batch, each with the text it has alone."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from raw_client import RawRequest
from requirements import IS_LONG
from server_process import ServerProcess, serving

NUM_STREAMS = 200
# `make test` compares a fixed sample of the texts with those alone, `make test-all` every one.
COMPARED = range(0, NUM_STREAMS, 1 if IS_LONG else 20)
NUM_TOKENS = 24
KV_BYTES = 1 << 30
SUBJECTS = ["a mill", "the sea", "an old clock", "two foxes", "winter", "a bridge", "the moon", "a blue train"]


@pytest.fixture(scope="module")
def wide(demo_model: object) -> Iterator[ServerProcess]:
    # How many may run at once is left to memory alone: nobody is refused or kept waiting for how long a step takes.
    targets = ["--ttft-targets-s=1e6,1e6,1e6", "--itl-targets-ms=1e6,1e6,1e6"]
    with serving("--batch-invariant", "--kv-cache-bytes", str(KV_BYTES), *targets) as process:
        yield process


def _body(i: int) -> dict[str, object]:
    prompt = f"Story number {i}, about {SUBJECTS[i % len(SUBJECTS)]}:"
    return {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}


def _stream(server: ServerProcess, i: int) -> str:
    with RawRequest(server.url(), "/v1/completions", _body(i)) as request:
        request.read_until(b"data: [DONE]\n\n")
        return _text(request.received)


def _text(received: bytes) -> str:
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line[6:])["choices"])


def test_two_hundred_streams_run_at_once_with_the_texts_they_have_alone(wide: ServerProcess) -> None:
    alone = {i: _stream(wide, i) for i in COMPARED}
    before = wide.resident_bytes()
    started = threading.Barrier(NUM_STREAMS)
    peaks = {"running": 0.0, "resident": 0.0}
    is_over = threading.Event()

    def stream(i: int) -> str:
        started.wait(timeout=60)
        return _stream(wide, i)

    def watch() -> None:
        while not is_over.wait(0.05):
            peaks["running"] = max(peaks["running"], wide.metrics()["headrace_num_requests_running"])
            peaks["resident"] = max(peaks["resident"], wide.resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        texts = list(pool.map(stream, range(NUM_STREAMS)))
    is_over.set()
    watcher.join()

    assert {i: texts[i] for i in alone} == alone
    assert all(len(text) > 20 for text in texts)
    assert peaks["running"] == NUM_STREAMS
    assert peaks["resident"] - before <= KV_BYTES + 200 * 2**20
    metrics = wide.metrics()
    assert metrics["headrace_num_requests_running"] == metrics["headrace_num_requests_waiting"] == 0
    assert metrics["headrace_kv_cache_free_blocks"] == metrics["headrace_kv_cache_total_blocks"]
