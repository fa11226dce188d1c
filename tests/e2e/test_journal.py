"""Streams that outlive a server which is killed, twice, and one that is told to end."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from chat_page import open_chat_page
from fake_engine import VOCAB_SIZE, FakeRunner, byte_tokenizer, expected_text
from live_server import live_server
from resuming_readers import Reader, ResponseReader
from server_process import ServerProcess
from tiny_models import tiny_llama
from waiting import until

NUM_TOKENS = 700


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says anything, so fast that starting it is all that takes time."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(vocab_size=VOCAB_SIZE, max_position_embeddings=2048).save_pretrained(path)
    byte_tokenizer()._wrapper.save_pretrained(path)
    return path


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_streams_go_on_after_two_kills_and_a_drain_interrupts_them(
    tiny_model: Path, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    args = [str(tiny_model), "--dtype", "float32", "--kv-cache-bytes", "64MiB", "--max-num-seqs", "5"]
    args += ["--ttft-targets-s=1e6,1e6,1e6", "--journal-file", str(tmp_path / "streams.db"), "--drain-grace-s", "0"]
    greedy = {"prompt": "The mill", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    sampled = greedy | {"temperature": 1.2, "seed": 7, "top_p": 0.95}
    soon_over, *bodies = [
        sampled | {"prompt": "Soon over", "max_tokens": 5},
        greedy,
        sampled | {"presence_penalty": 0.3, "frequency_penalty": 0.1},
        sampled | {"seed": 8, "repetition_penalty": 1.1, "logit_bias": {"65": 2}},
        sampled | {"seed": 9},  # which gets a stop string
        sampled | {"prompt": "One that waits", "seed": 10},
    ]

    def start_server() -> ServerProcess:
        return ServerProcess(args, {"OMP_NUM_THREADS": "1"})  # more would only wait for each other

    def answer_to(body: dict[str, Any]) -> str:
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
        assert isinstance(text, str)
        return text

    def start(body: dict[str, Any]) -> Reader:
        return Reader(httpx.post(f"{url}/v1/streams", json=body | {"on_disconnect": "continue"}).json())

    server = start_server()
    url = server.url()
    text = answer_to(bodies[3])
    late = next(k for k in range(len(text) * 3 // 4, len(text)) if text.find(text[k : k + 5]) == k)
    bodies[3] = bodies[3] | {"stop": [text[late : late + 5]]}
    over = start(soon_over)
    over.follow(url)
    asked = {"input": "The mill", "max_output_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    response = ResponseReader(httpx.post(f"{url}/v1/responses", json=asked | {"background": True}).json())
    readers = [response, *(start(body) for body in bodies)]
    running = readers[:4]  # and one more; the last waits
    for num_events in (20, 60):
        following = [threads.submit(reader.follow, url) for reader in readers]
        until(lambda n=num_events: all(len(r.events) > n for r in running), "all are under way")  # type: ignore[misc]
        server.process.kill()
        for future in following:
            future.result()
        server.stop()
        assert any(reader.events[-1]["event"] == "token" for reader in running), "some were cut off"
        server = start_server()
        url = server.url()
    for future in [threads.submit(reader.follow, url) for reader in readers]:
        future.result()
    whole = httpx.post(f"{url}/v1/responses", json=asked | {"store": False}, timeout=120).json()
    assert response.text == whole["output"][0]["content"][0]["text"]
    assert [int(event["id"]) for event in response.events] == list(range(len(response.events)))
    assert response.events[-1]["event"] == "response.incomplete"
    for text, reader in zip(threads.map(answer_to, [*bodies, soon_over]), [*readers[1:], over], strict=True):
        assert [event["event"] for event in reader.events if event["event"] not in ("token", "queued")] == ["done"]
        assert reader.text == text
        for behind in range(0, len(reader.events), 1 + len(reader.events) // 4):
            again = Reader(reader.created)
            again.events = reader.events[: behind + 1]
            again.follow(url)
            assert again.text == reader.text

    drained = start(greedy | {"max_tokens": 1900})
    following = [threads.submit(drained.follow, url)]
    until(lambda: len(drained.events) > 20, "it is under way")
    server.process.send_signal(signal.SIGTERM)
    following[0].result()
    assert server.stop() == 0
    assert drained.events[-1]["event"] == "interrupted"
    assert drained.events[-1]["id"] == drained.events[-2]["id"]
    assert "Traceback" not in server.output


def test_the_chat_page_goes_on_with_an_answer_after_a_restart(browser: Browser, tmp_path: Path) -> None:
    prompt, runner = "[user]hi\n[assistant]", FakeRunner()
    settings: dict[str, Any] = {"journal_file": tmp_path / "streams.db", "stream_retry_ms": 100}
    with ExitStack() as held:
        held.enter_context(runner.held())
        with live_server(runner=runner, **settings) as first, open_chat_page(browser, first.url) as chat:
            chat.bound_answers(30)
            chat.ask("hi")
            runner.allow(7)
            chat.until_text(expected_text(prompt, 7))
            stop = threading.Thread(target=first.stop)
            stop.start()
            chat.until_note("reconnecting")
            held.close()
            stop.join()
            with live_server(port=first.port, **settings):
                chat.until("done")
                chat.until_text(expected_text(prompt, 30))
                assert chat.stored()["turns"][-1]["answers"][-1]["usage"]["completion_tokens"] == 30
