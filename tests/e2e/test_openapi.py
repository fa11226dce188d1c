"""Requests made from the OpenAPI document, most of them wrong, against a server on a socket, while others read streams.

Schemathesis tries the edges of every constraint, then random requests, then calls that follow from each other, and
judges each answer by the document: wrong data is refused, right data accepted, status, headers and content are listed,
a missing key is missed.
"""

import multiprocessing
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from asgi_client import chunks
from fake_engine import FakeRunner, expected_text, make_scheduler
from fake_one_shots import FakeOneShot, write_image_model, write_text_model
from headrace.scheduler.config import OneShotTask
from headrace.server.api_keys import append_key, create_key
from live_server import LiveServer, live_server
from openapi_client import try_everything
from waiting import until

MAX_TOKENS = 100
# Between a neighbour's streams, so that most of the time is the others'.
PAUSE_S = 0.5


@contextmanager
def neighbour(url: str, secret: str) -> Iterator[list[str]]:
    """Somebody who reads one stream after the other; what was wrong with them, or "" for those that were as alone."""
    is_over = threading.Event()
    seen: list[str] = []

    def read() -> None:
        with httpx.Client(base_url=url, headers={"x-api-key": secret}, timeout=60) as client:
            while not is_over.wait(PAUSE_S):
                prompt = f"river {len(seen)}"
                body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
                answer = client.post("/v1/completions", json=body)
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks(answer.content))
                expected = expected_text(prompt, MAX_TOKENS)
                seen.append("" if text == expected else f"{text!r} instead of {expected!r}")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join(60)
        assert not thread.is_alive()


def gauges(server: LiveServer, secret: str) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers={"x-api-key": secret}).text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio", "event_loop_tasks")
    values = {name: float(value) for name, value in re.findall(r"^headrace_(\w+) (\S+)$", text, re.M)}
    return {name: values[name] for name in names}


def test_every_answer_is_as_the_document_says_and_no_wrong_request_is_felt_by_others(tmp_path: Path) -> None:
    secret, key = create_key("someone")
    append_key(tmp_path / "keys.toml", key)
    texts, images = write_text_model(tmp_path / "texts"), write_image_model(tmp_path / "images")
    one_shots = [
        FakeOneShot("embedder", OneShotTask.EMBED, texts),
        FakeOneShot("ranker", OneShotTask.SCORE, texts),
        FakeOneShot("painter", OneShotTask.CLASSIFY, images),
    ]
    scheduler = make_scheduler(num_blocks=512)
    with live_server(
        runner=FakeRunner(max_context_tokens=128),
        scheduler=scheduler,
        one_shots=one_shots,
        api_keys_file=tmp_path / "keys.toml",
    ) as server:
        before = gauges(server, secret)
        spawn = multiprocessing.get_context("spawn")
        with neighbour(server.url, secret) as streams, ProcessPoolExecutor(1, spawn) as process:
            outcome = process.submit(try_everything, server.url, secret).result()
        print(f"{outcome.num_wrong} wrong requests, {outcome.num_right} right ones: {outcome.statuses}")
        until(lambda: gauges(server, secret) == before, "all that was started is over")
    assert not outcome.faults, "\n\n".join(outcome.faults)
    assert outcome.num_wrong > 2000
    assert outcome.statuses[200] + outcome.statuses[201] > 500
    assert len(streams) > 1
    assert not any(streams), next(filter(None, streams))
    scheduler.check_books()
    assert scheduler.load().num_free_blocks == scheduler.load().num_total_blocks
